"""Triton kernels that use a token map: merge, its backward, and unmerge.

`row` numbers tokens through the batch. Sums are in float32 and in the order of moved_rows, whatever
the scheduling: two runs give the same bits.
"""

import triton
import triton.language as tl

# How a group becomes one token.
MEAN, SUM, DIRECTION, WEIGHTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _members(first, group, groups, moved):
    """Where the tokens that merged into these heads begin in moved_rows, and how many they are."""
    begin = tl.load(first + group, mask=group < groups, other=0)
    end = tl.load(first + group + 1, mask=group + 1 < groups, other=moved)
    return begin, tl.where(group < groups, end - begin, 0).to(tl.int32)


@triton.jit
def _rows(x, row, there, channel, channels):
    """These rows of x, float32 [HEADS, BLOCK]; zeros where there are none."""
    at = row[:, None] * channels + channel[None, :]
    mask = there[:, None] & (channel < channels)[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, row, there):
    return tl.load(weight + row, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _total(
    own, x, head, begin, count, most, moved_rows, weight, channel, channels, HOW: tl.constexpr
):
    """The sums of groups, float32 [HEADS, BLOCK]. own: the rows of their heads."""
    total = own
    if HOW == WEIGHTED:
        total *= _weights(weight, head, head >= 0)
    for index in range(most):
        there = index < count
        row = tl.load(moved_rows + begin + index, mask=there, other=0)
        value = _rows(x, row, there, channel, channels)
        if HOW == WEIGHTED:
            value *= _weights(weight, row, there)
        total += value
    return total


@triton.jit
def _lengths(
    x, grad, head, group, there, begin, count, most, moved_rows, channels,
    GRAD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The squared lengths of heads and of sums, and with GRAD the products of sums and gradients.

    Float32 [HEADS] each. All channels are read once for it.
    """
    head_squares = tl.zeros([HEADS], tl.float32)
    squares = tl.zeros([HEADS], tl.float32)
    product = tl.zeros([HEADS], tl.float32)
    for at in range(0, channels, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        own = _rows(x, head, there, channel, channels)
        head_squares += tl.sum(own * own, 1)
        total = _total(own, x, head, begin, count, most, moved_rows, x, channel, channels, SUM)
        squares += tl.sum(total * total, 1)
        if GRAD:
            product += tl.sum(total * _rows(grad, group, there, channel, channels), 1)
    return head_squares, squares, product


@triton.jit
def _divisor(size, head, group, groups, begin, count, most, moved_rows, weight, HOW: tl.constexpr):
    """What the sums are divided by, float32 [HEADS]."""
    if HOW == WEIGHTED:
        divisor = tl.load(weight + head, mask=head >= 0, other=1.0).to(tl.float32)
        for index in range(most):
            there = index < count
            row = tl.load(moved_rows + begin + index, mask=there, other=0)
            divisor += tl.load(weight + row, mask=there, other=0.0).to(tl.float32)
    elif HOW == MEAN:
        divisor = tl.load(size + group, mask=group < groups, other=1.0)
    else:
        divisor = tl.full([group.shape[0]], 1.0, tl.float32)
    return divisor


@triton.jit
def merge_kernel(
    x, y, head_rows, moved_rows, first, size, weight, groups, moved, channels,
    HOW: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduce groups to tokens. Grid: [tiles of heads, tiles of channels; "direction": 1].

    x [B·N, C] → y [B·M, C].
    """
    group = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    there = group < groups
    head = tl.load(head_rows + group, mask=there, other=-1)
    begin, count = _members(first, group, groups, moved)
    most = tl.max(count)
    start, stop = tl.program_id(1) * BLOCK, tl.minimum((tl.program_id(1) + 1) * BLOCK, channels)
    divisor = _divisor(size, head, group, groups, begin, count, most, moved_rows, weight, HOW)
    if HOW == DIRECTION:  # Rescaled to the norm of the head: the channels are read twice.
        stop = channels
        head_squares, squares, _ = _lengths(
            x, x, head, group, there, begin, count, most, moved_rows, channels, False, HEADS, BLOCK
        )
        divisor = tl.maximum(tl.sqrt(squares), 1e-6) / tl.maximum(tl.sqrt(head_squares), 1e-6)
    for at in range(start, stop, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        own = _rows(x, head, there, channel, channels)
        total = _total(own, x, head, begin, count, most, moved_rows, weight, channel, channels, HOW)
        out = y + group[:, None] * channels + channel[None, :]
        mask = there[:, None] & (channel < channels)[None, :]
        tl.store(out, (total / divisor[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def merge_backward_kernel(
    grad, x, grad_x, head_rows, moved_rows, first, size, weight, groups, moved, channels,
    HOW: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of `merge_kernel`, on the same grid. Each token is in one group: no sums.

    grad [B·M, C], x [B·N, C] (read for "direction" only) → grad_x [B·N, C].
    """
    group = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    there = group < groups
    head = tl.load(head_rows + group, mask=there, other=-1)
    begin, count = _members(first, group, groups, moved)
    most = tl.max(count)
    start, stop = tl.program_id(1) * BLOCK, tl.minimum((tl.program_id(1) + 1) * BLOCK, channels)
    divisor = _divisor(size, head, group, groups, begin, count, most, moved_rows, weight, HOW)
    along = tl.zeros([HEADS], tl.float32)
    of_length = tl.zeros([HEADS], tl.float32)
    if HOW == DIRECTION:
        # y = t·l/n with n = |t| and l = |x of the head|. So the gradient of t is l/n·(g − u·(u·g))
        # with u = t/n, and the head has that of l besides: u·g times x/l. A norm below 1e-6 is
        # clamped and has no gradient.
        stop = channels
        head_squares, squares, product = _lengths(
            x, grad, head, group, there, begin, count, most, moved_rows, channels,
            True, HEADS, BLOCK,
        )  # fmt: skip
        length, norm = tl.sqrt(head_squares), tl.sqrt(squares)
        clamped, clamped_norm = tl.maximum(length, 1e-6), tl.maximum(norm, 1e-6)
        divisor = clamped_norm / clamped
        along = tl.where(norm > 1e-6, product / (clamped_norm * clamped_norm), 0.0) / divisor
        of_length = tl.where(length > 1e-6, product / (clamped_norm * clamped), 0.0)
    for at in range(start, stop, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        inside = (channel < channels)[None, :]
        g = _rows(grad, group, there, channel, channels) / divisor[:, None]
        of_head = g
        if HOW == DIRECTION:
            own = _rows(x, head, head >= 0, channel, channels)
            total = _total(own, x, head, begin, count, most, moved_rows, x, channel, channels, SUM)
            g -= total * along[:, None]
            # By another mask, so that it is read again and not kept in registers meanwhile.
            own = _rows(x, head, there, channel, channels)
            of_head = g + own * of_length[:, None]
        if HOW == WEIGHTED:
            of_head = g * _weights(weight, head, there)
        out = grad_x + head[:, None] * channels + channel[None, :]
        tl.store(out, of_head.to(grad_x.dtype.element_ty), mask=there[:, None] & inside)
        for index in range(most):
            joins = index < count
            row = tl.load(moved_rows + begin + index, mask=joins, other=0)
            own_g = g
            if HOW == WEIGHTED:
                own_g = g * _weights(weight, row, joins)
            out = grad_x + row[:, None] * channels + channel[None, :]
            tl.store(out, own_g.to(grad_x.dtype.element_ty), mask=joins[:, None] & inside)


@triton.jit
def unmerge_kernel(
    y, x, merged, out, group_rows, rows, channels,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy groups to their tokens. Grid: [tiles of rows, tiles of channels].

    y [B·M, C] → out [B·N, C]; zeros where group_rows is −1. RESIDUAL: x + (y − merged)[group].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(group_rows + row, mask=row < rows, other=-1)
    inside = (channel < channels)[None, :]
    mask = (group >= 0)[:, None] & inside
    there = (row < rows)[:, None] & inside
    at = group[:, None] * channels + channel[None, :]
    own = row[:, None] * channels + channel[None, :]
    value = tl.load(y + at, mask=mask, other=0.0)
    if RESIDUAL:
        wide = value.to(tl.float32) - tl.load(merged + at, mask=mask, other=0.0).to(tl.float32)
        wide += tl.load(x + own, mask=there, other=0.0).to(tl.float32)
        value = wide.to(out.dtype.element_ty)
    tl.store(out + own, value, mask=there)
