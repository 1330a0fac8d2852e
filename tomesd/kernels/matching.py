"""Triton kernels that make a token map: match, cut, link, number, join.

Tokens are numbered within their sample, `row` numbers them through the batch. S: sources of all
windows, in the order of the windows. No kernel waits for the host, and none adds floats atomically.
"""

import triton
import triton.language as tl


@triton.jit
def match_kernel(
    x, order, similarity, target, n, channels, n_src, n_dst,
    SRC: tl.constexpr, DST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each source's best destination in its window. Grid: [tiles of sources, windows, batch].

    x [B, N, C]. order [windows, n_src + n_dst]. Out: similarity fp32 [B, S], target int32 [B, S].
    Norms are computed on the way; no score is written. The first of equals wins.
    """
    window, sample = tl.program_id(1), tl.program_id(2)
    src_at = tl.program_id(0) * SRC + tl.arange(0, SRC)
    order += window * (n_src + n_dst)
    src = tl.load(order + src_at, mask=src_at < n_src, other=-1)
    x += sample.to(tl.int64) * n * channels
    # Destinations are padded at the end of a window, so that the first of them is there.
    target_of = tl.zeros([SRC], tl.int32) + tl.load(order + n_src).to(tl.int32)
    best = tl.full([SRC], float("-inf"), tl.float32)
    for start in range(0, n_dst, DST):
        dst_at = start + tl.arange(0, DST)
        dst = tl.load(order + n_src + dst_at, mask=dst_at < n_dst, other=-1)
        dots = tl.zeros([SRC, DST], tl.float32)
        src_squares = tl.zeros([SRC], tl.float32)
        dst_squares = tl.zeros([DST], tl.float32)
        for first in range(0, channels, BLOCK):
            channel = first + tl.arange(0, BLOCK)
            inside = (channel < channels)[None, :]
            own = (src >= 0)[:, None] & inside
            other = (dst >= 0)[:, None] & inside
            a = tl.load(x + src[:, None] * channels + channel[None, :], mask=own, other=0.0)
            b = tl.load(x + dst[:, None] * channels + channel[None, :], mask=other, other=0.0)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            src_squares += tl.sum(wide_a * wide_a, 1)
            dst_squares += tl.sum(wide_b * wide_b, 1)
        lengths = tl.maximum(tl.sqrt(dst_squares), 1e-6)
        scores = dots / (tl.maximum(tl.sqrt(src_squares), 1e-6)[:, None] * lengths[None, :])
        # Neither a padded destination nor NaN wins.
        scores = tl.where((dst >= 0)[None, :] & (scores == scores), scores, float("-inf"))
        top = tl.max(scores, 1)
        place = tl.argmax(scores, 1)
        hit = tl.arange(0, DST)[None, :] == place[:, None]
        found = tl.sum(tl.where(hit, dst[None, :].to(tl.int32), 0), 1)
        target_of = tl.where(top > best, found, target_of)
        best = tl.maximum(best, top)
    at = (sample * tl.num_programs(1) + window) * n_src + src_at
    tl.store(similarity + at, best, mask=src_at < n_src)
    tl.store(target + at, target_of, mask=src_at < n_src)


@triton.jit
def _keys(similarity, order, at, n_src, width, sources):
    """Similarities as whole numbers that sort alike, above 0; 0 for padding and past the end."""
    inside = at < sources
    token = tl.load(order + at // n_src * width + at % n_src, mask=inside, other=-1)
    value = tl.load(similarity + at, mask=inside, other=0.0)
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    return tl.where(inside & (token >= 0), key, 0)


@triton.jit
def cut_kernel(
    similarity, order, cut, into, place, r, n, sources, n_src, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the r best sources end. Grid: [batch].

    Out: cut int64 [B, 2], the smallest key that merges and the last source with just that key that
    does. A radix select, eight bits at a time. Also fills into with −1 and place with 0, [B, N].
    """
    sample = tl.program_id(0).to(tl.int64)
    similarity += sample * sources
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(into + sample * n + token, tl.full([BLOCK], -1, tl.int32), mask=token < n)
        tl.store(place + sample * n + token, tl.zeros([BLOCK], tl.int32), mask=token < n)
    digits = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int64)
    wanted = tl.zeros([], tl.int32) + r
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, sources, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = _keys(similarity, order, at, n_src, width, sources)
            alike = (key >> (shift + 8)) == prefix
            own = tl.where(alike, (key >> shift) & 0xFF, 0).to(tl.int32)
            others = tl.sum(tl.where(alike, 0, 1))
            counts += tl.histogram(own, 256) - tl.where(digits == 0, others, 0)
        # Keys that are larger in this digit, for each digit.
        above = tl.sum(counts) - tl.cumsum(counts)
        digit = tl.sum((above >= wanted).to(tl.int32))
        wanted -= tl.sum(tl.where(digits == digit, above, 0))
        prefix = (prefix << 8) + digit
    last = tl.full([], -1, tl.int32)
    for start in range(0, sources, BLOCK):
        at = start + tl.arange(0, BLOCK)
        equal = (_keys(similarity, order, at, n_src, width, sources) == prefix).to(tl.int32)
        rank = tl.cumsum(equal)
        hit = (equal == 1) & (rank == wanted)
        last = tl.maximum(last, tl.max(tl.where(hit, at, -1)))
        wanted -= tl.sum(equal)
    tl.store(cut + 2 * sample, prefix)
    tl.store(cut + 2 * sample + 1, last.to(tl.int64))


@triton.jit
def link_kernel(
    similarity, target, order, cut, into, place, n, sources, n_src, n_dst,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What merges into what. Grid: [tiles of a window's tokens, windows, batch].

    Out: into int32 [B, N], the target of a token that merges, else −1; place int32 [B, N]: how many
    sources before it merge into the same target, or, of a destination, how many in all.
    """
    window, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = n_src + n_dst
    similarity += sample * sources
    target += sample * sources
    key, last = tl.load(cut + 2 * sample), tl.load(cut + 2 * sample + 1)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = tl.load(order + window * width + at, mask=at < width, other=-1)
    own = window * n_src + at
    is_src = at < n_src
    own_key = _keys(similarity, order, tl.where(is_src, own, sources), n_src, width, sources)
    merges = is_src & ((own_key > key) | ((own_key == key) & (own <= last)))
    joined = tl.load(target + own, mask=is_src, other=-1)
    group = tl.where(is_src, joined, token.to(tl.int32))
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, n_src, BLOCK):
        other = start + tl.arange(0, BLOCK)
        there = window * n_src + other
        inside = other < n_src
        its_key = _keys(similarity, order, tl.where(inside, there, sources), n_src, width, sources)
        its_group = tl.load(target + there, mask=inside, other=-1)
        moves = inside & ((its_key > key) | ((its_key == key) & (there <= last)))
        earlier = moves[None, :] & (other[None, :] < at[:, None])
        same = earlier & (its_group[None, :] == group[:, None])
        count += tl.sum(same.to(tl.int32), 1)
    out = sample * n + token
    tl.store(into + out, tl.where(merges, joined, -1), mask=token >= 0)
    tl.store(place + out, tl.where(merges | (at >= n_src), count, 0), mask=token >= 0)


@triton.jit
def number_kernel(
    into, place, group_rows, head_rows, first, size, n, m, r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Number the heads by their position. Grid: [tiles of tokens, batch].

    Out, for heads only: group_rows [B, N], head_rows [B, M], size [B, M], and first [B, M], the
    place in moved_rows where the tokens that merged into a head begin. Each program counts the
    tokens before its own again, instead of waiting for others.
    """
    tile, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    into += sample * n
    place += sample * n
    heads = tl.zeros([], tl.int32)
    joined = tl.zeros([], tl.int32)
    for start in range(0, tile * BLOCK, BLOCK):
        token = start + tl.arange(0, BLOCK)
        stays = tl.load(into + token) < 0
        heads += tl.sum(stays.to(tl.int32))
        joined += tl.sum(tl.where(stays, tl.load(place + token), 0))
    token = tile * BLOCK + tl.arange(0, BLOCK)
    stays = tl.load(into + token, mask=token < n, other=0) < 0
    merged = tl.where(stays, tl.load(place + token, mask=stays, other=0), 0)
    group = sample * m + heads + tl.cumsum(stays.to(tl.int32)) - 1
    row = sample * n + token
    tl.store(group_rows + row, group, mask=stays)
    tl.store(head_rows + group, row, mask=stays)
    tl.store(first + group, sample * r + joined + tl.cumsum(merged) - merged, mask=stays)
    tl.store(size + group, (1 + merged).to(tl.float32), mask=stays)


@triton.jit
def join_kernel(
    into, place, group_rows, moved_rows, first, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Let merged tokens join their heads' groups. Grid: [tiles of tokens, batch].

    Out, for merged tokens only: group_rows [B, N], and moved_rows [B, r], sorted by group.
    """
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = sample * n + token
    head = tl.load(into + row, mask=token < n, other=-1)
    moves = head >= 0
    group = tl.load(group_rows + sample * n + head, mask=moves, other=0)
    slot = tl.load(first + group, mask=moves, other=0) + tl.load(place + row, mask=moves, other=0)
    tl.store(group_rows + row, group, mask=moves)
    tl.store(moved_rows + slot, row, mask=moves)
