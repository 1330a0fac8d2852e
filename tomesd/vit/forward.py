"""The token maps of one forward of a Vision Transformer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from tomesd.core.packing import packed, with_tail
from tomesd.core.token_map import TokenMap
from tomesd.vit import schedule
from tomesd.vit.matcher import Matcher
from tomesd.vit.settings import ViTSettings


@dataclass(eq=False)
class Forward:
    """The token maps of one forward.

    maps[i] maps the first block's tokens to those that block i gets, maps[-1] to those after the
    last block; steps[i] is what block i merges, None for nothing. Where blocks merge within
    themselves, maps[i] is what block i merges, and there is nothing else. They are kept by block,
    so that gradient checkpointing, which runs blocks again in any order, finds them. lengths[i]:
    of the pictures whose tokens are packed into the one sequence that block i gets; None for
    samples of a batch. Each picture merges for itself.

    prefix, suffix: how many leading and trailing tokens never merge. collected: whether another
    caller than the model's own forward runs the blocks, and may keep what each of them gives.
    """

    settings: ViTSettings
    matcher: Matcher
    prefix: int
    suffix: int
    schedule: list[int]
    maps: list[TokenMap] = field(init=False)
    steps: list[TokenMap | None] = field(init=False)
    lengths: list[Sequence[int] | None] = field(init=False)
    masks_tokens: bool = False
    collected: bool = False

    def __post_init__(self) -> None:
        self.maps = [None] * (len(self.schedule) + 1)  # type: ignore[list-item]
        self.steps = [None] * len(self.schedule)
        self.lengths = [None] * len(self.maps)

    def key_bias(self, layer: int, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to the attention logits of a block's keys: [B, N] in x's dtype, or None.

        x: [B, N, C], the block's tokens. mask: the host's own, on the first block's tokens. A
        masked token counts for nothing wherever it merges: it has size zero.
        """
        if layer == 0 and not self.settings.within_blocks:
            self.maps[0] = self._weighed(TokenMap.identity(x), x, mask)
        so_far = self.maps[layer]
        if so_far is None or so_far.size.shape[:2] != x.shape[:2]:
            raise direct_call_error(layer, x)
        if not self.masks_tokens and (not self.settings.prop_attn or so_far.m == so_far.n):
            return None
        size = so_far.size.squeeze(-1)
        if not self.settings.prop_attn:
            size = (size > 0).to(size.dtype)
        return size.log().to(x.dtype)

    def _weighed(self, token_map: TokenMap, x: Tensor, mask: Tensor | None) -> TokenMap:
        """The map of a block's tokens x, [B, N, C], where tokens that a mask hides have no size."""
        self.masks_tokens = mask is not None
        if mask is None:
            return token_map
        size = _visible(mask, x).to(token_map.size.dtype)[..., None]
        return replace(token_map, size=token_map.merge(size, how="sum"))

    def merge_within(self, layer: int, x: Tensor, mask: Tensor | None, keep: int = 1) -> Tensor:
        """Merge the tokens [B, N, C] that a block gets, for this block alone.

        keep: the number of tokens that are left must be a multiple of it.
        """
        features = dict.fromkeys(self.matcher.needs, x.detach()[:, :, None])
        # All of them get the same pictures.
        step = self._step(layer, features, x.shape[1], self.lengths[0], keep)
        self.maps[layer] = None  # type: ignore[call-overload]
        if step is None:
            return x
        self.maps[layer] = self._weighed(step, x, mask)
        visible = torch.ones_like(x[..., :1], dtype=torch.float32)
        if mask is not None:
            visible = _visible(mask, x).to(torch.float32)[..., None]
        return self.matcher.merge(step, x, visible)

    def left(self, layer: int, lengths: Sequence[int]) -> list[int]:
        """The lengths of packed pictures after a block, from those before it."""
        return [n - self._how_many(layer, n) for n in lengths]

    def _how_many(self, layer: int, n: int) -> int:
        return schedule.clipped(self.schedule[layer], n, self.prefix + self.suffix)

    def _step(
        self,
        layer: int,
        features: dict[str, Tensor],
        n: int,
        lengths: Sequence[int] | None,
        keep: int = 1,
    ) -> TokenMap | None:
        """What a block of n tokens merges, None for nothing. keep: as in `merge_within`."""
        if lengths is not None:
            return self._packed_step(layer, features, lengths)
        r = self._how_many(layer, n)
        r -= (r - n) % keep
        return self._map(layer, features, r) if r > 0 else None

    def _packed_step(
        self, layer: int, features: dict[str, Tensor], lengths: Sequence[int]
    ) -> TokenMap | None:
        """`_step` for features [1, N, H, D] of pictures that are packed into one sequence."""
        if not any(self._how_many(layer, n) for n in lengths):
            return None
        maps, start = [], 0
        for n, run in groupby(lengths):  # Pictures of one size that follow each other are a batch.
            end = start + n * len(list(run))
            parts = {name: x[0, start:end].unflatten(0, (-1, n)) for name, x in features.items()}
            step = self._step(layer, parts, n, None)
            maps.append(step or TokenMap.identity(next(iter(parts.values()))))
            start = end
        return packed(maps)

    def _map(self, layer: int, features: dict[str, Tensor], r: int) -> TokenMap:
        layers, end = len(self.steps), self.suffix
        if not end:
            return self.matcher.token_map(features, self.prefix, r, layer, layers)
        leading = {name: feature[:, :-end] for name, feature in features.items()}
        step = self.matcher.token_map(leading, self.prefix, r, layer, layers)
        return with_tail(step, end)

    def match(self, layer: int, features: dict[str, Tensor], n: int) -> None:
        """Decide what a block of n tokens merges."""
        lengths = self.lengths[layer]
        step = self._step(layer, features, n, lengths)
        if lengths is not None:
            self.lengths[layer + 1] = self.left(layer, lengths)
        before = self.maps[layer]
        self.steps[layer] = step
        self.maps[layer + 1] = before if step is None else before.then(step)

    def merge(self, layer: int, x: Tensor) -> Tensor:
        step = self.steps[layer]
        return x if step is None else self.matcher.merge(step, x, self.maps[layer].size)

    def all_tokens(self, layer: int, x: Tensor) -> Tensor:
        """x: what goes into a block, or comes out of the last; merged, or all tokens already."""
        so_far = self.maps[layer]
        return so_far.unmerge(x) if so_far.m < so_far.n and x.shape[1] == so_far.m else x

    def merged_tokens(self, layer: int, x: Tensor, how: str) -> Tensor:
        """The inverse of `all_tokens`. how: as in `TokenMap.merge`."""
        so_far = self.maps[layer]
        if so_far is None or so_far.m == so_far.n or x.shape[1] != so_far.n:
            return x
        return so_far.merge(x, how=how)


def direct_call_error(layer: int, x: Tensor) -> RuntimeError:
    """What to raise in a block that did not get what the block before it returned."""
    return RuntimeError(
        f"block {layer} of a patched Vision Transformer must be called by its model, with what "
        f"block {layer - 1} returned, got a tensor of shape {tuple(x.shape)} from elsewhere; "
        "remove_patch to call single blocks"
    )


def _visible(mask: Tensor, x: Tensor) -> Tensor:
    """Which tokens a host's attention mask leaves visible: bool [B, N].

    mask: broadcastable to [B, heads, N, N], True or 0 for a visible key, else False or very
    negative. Raises ValueError unless it is the same for every head and visible query: merged
    tokens are one query.
    """
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    visible = seen[:, :1].any(2, keepdim=True)
    # A compiled graph cannot read the data.
    if not torch.compiler.is_compiling():
        varies = ((seen != visible) & visible.transpose(2, 3)).any()
        weighs = mask.dtype != torch.bool and mask.masked_fill(~seen, 0).any()
        if varies or weighs:
            raise ValueError(
                "attention_mask must hide the same tokens from all queries and heads where tokens "
                f"merge, and do nothing else, got one of shape {tuple(mask.shape)}; remove_patch "
                "first"
            )
    return visible[:, 0, 0].expand(x.shape[:2])
