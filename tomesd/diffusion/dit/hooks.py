"""The hooks on a diffusion transformer and its blocks; `diffusers_transformer` installs them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomesd.core.frames import nothing_merged, side_by_side
from tomesd.core.partition import make_key
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.attention_bias import fit_bias
from tomesd.diffusion.dit.record import Blocks, Family, Grid
from tomesd.diffusion.dit.video import VideoMatching
from tomesd.diffusion.guidance import check_guidance, is_skipped
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.hooks import Threads, by_name, is_cached


class _Place(NamedTuple):
    """What a block has to know of the forward pass that it is in."""

    grids: tuple[Grid, ...]
    timestep: Any
    stage: int


# Under which a block finds its place in a dict.
_PLACE = "tomesd_place"


@dataclass(eq=False)
class Run:
    """What one thread is doing in one model.

    stage, grids, place: of the forward pass; grids where they are in its data, until it begins. The
    rest, of the block that is running: its token map or None where nothing merges, its image
    tokens, unmerged and merged, and the bias of its keys.
    """

    stage: int = 0
    grids: tuple[Grid, ...] | None = None
    place: Any = None
    map: Any = None
    x: Any = None
    merged: Any = None
    bias: Any = None


@dataclass(eq=False)
class ModelHooks:
    """The hooks on the model itself.

    last: the place of the last forward pass of any thread, for reports, and for a block that is
        called again in a thread of autograd's own.
    """

    family: Family
    threads: Threads[Run]
    names: tuple[str, ...]
    last: _Place | None = None

    @property
    def run(self) -> Run:
        return self.threads.run

    def note_place(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple:
        noted, self.run.grids = self.run.grids, None
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(_CACHED)
        given = by_name(self.names, args, kwargs)
        timestep = given[self.family.timestep]
        grids = noted or self.family.grids(model, given)
        place = _Place(grids, timestep, self.run.stage)
        self.run.place = self.last = place
        if self.family.kwargs:
            given[self.family.kwargs] = (given.get(self.family.kwargs) or {}) | {_PLACE: place}
        return _as_called(self.names, args, given)

    def append_place(self, rope: nn.Module, args: tuple, output: tuple) -> tuple:
        return *output, self.place

    @property
    def place(self) -> _Place | None:
        return self.run.place or self.last


@dataclass(eq=False)
class BlockHooks:
    """The hooks of one block.

    counts: of image tokens and of pairs of queries and keys, each unmerged and merged, in the last
    forward pass. why_not: why nothing merged. stages: of the denoising, how each matches.
    """

    index: int
    kind: Blocks
    settings: DiffusionSettings
    stages: tuple[VideoMatching, ...]
    model: ModelHooks
    names: tuple[str, ...]
    attention_names: tuple[str, ...]
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    why_not: str = ""

    @property
    def gives_keys_back(self) -> bool:
        return bool(self.kind.keys) and self.settings.weighs_keys

    def merge(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple:
        kind, run = self.kind, self.model.run
        given = by_name(self.names, args, kwargs)
        x = given[kind.tokens]
        if is_cached(block, *block.children()):
            raise ValueError(_CACHED)
        place = self._place(given)
        run.map = run.bias = None
        if is_skipped(block):
            return _as_called(self.names, args, given)
        n = sum(f * h * w for f, h, w in place.grids)
        token_map = self._match(x, n, place)
        if kind.together and not kind.mask and given.get("attention_mask") is not None:
            raise ValueError(_MASKED)
        text = given[kind.text].shape[1] if kind.text else 0
        before, after = text + token_map.n, text + token_map.m
        pairs = after * (before if self.gives_keys_back else after)
        self.counts = n, n - before + after, before**2, pairs
        if token_map.m == token_map.n:
            return _as_called(self.names, args, given)
        for name in kind.attention:
            check_guidance(getattr(block, name), merges_queries=True, merges_keys=True)
        run.x, run.map, run.merged = x, token_map, token_map.merge(x)
        given[kind.tokens] = run.merged
        if given.get(kind.rotary) is not None:
            given[kind.rotary] = self._heads_positions(given[kind.rotary], token_map)
        for name, dim in kind.per_token:
            value = given.get(name)
            if value is not None and value.dim() > dim and value.shape[dim] == token_map.n:
                given[name] = _heads(value, token_map, dim)
        beside = (0, text) if kind.image_first else (text, 0)
        if given.get(kind.mask) is not None:
            given[kind.mask] = _of_keys(given[kind.mask], token_map, beside)
        if kind.bias and self.settings.weighs_keys:
            log_size = nn.functional.pad(token_map.size[..., 0].log(), beside).to(x.dtype)
            run.bias = log_size.view(len(log_size), *(1,) * (kind.bias - 2), -1)
        return _as_called(self.names, args, given)

    def _place(self, given: dict) -> Any:
        """Where the block is; its own arguments as the host made them again."""
        carrier = self.kind.carrier
        if not carrier:
            return self.model.place
        if isinstance(given[carrier], dict):
            given[carrier] = dict(given[carrier])
            return given[carrier].pop(_PLACE)
        *tables, place = given[carrier]
        given[carrier] = tuple(tables)
        return place

    def _match(self, x: Tensor, n: int, place: _Place) -> TokenMap:
        matching, batch, channels = self.stages[place.stage], len(x), x.shape[2]
        settings, joint = matching.settings, bool(self.kind.text or self.kind.together)
        text = x.shape[1] - n
        if text < 0 or (text and not self.kind.together):
            raise ValueError(
                f"{self.kind.tokens} of block {self.index} must have the tokens of the grids "
                f"{place.grids} (frames, height, width), got {x.shape[1]} tokens"
            )
        key = None
        if settings.is_random:
            key = make_key(settings.seed, place.timestep, self.index).to(x.device)
        if self.kind.rotary and self.kind.rotary_dim == 0:
            # One map for all samples, since they have one table of angles. The cosine of all
            # samples' features side by side is their cosines' mean, weighted by length: what
            # merges is alike in every sample, and a single sample merges as if it were alone.
            x = x.movedim(0, 1).flatten(1)[None]
        image_first = self.kind.image_first
        maps = [] if image_first or not text else [nothing_merged(x[:, :text])]
        start = 0 if image_first else text
        for frames, h, w in place.grids:
            part = x[:, start : start + frames * h * w]
            start += frames * h * w
            self.why_not = settings.why_not(
                x.device.type, batch * frames, h, w, channels, joint=joint
            )
            if self.why_not:
                maps.append(nothing_merged(part))
            else:
                maps.append(matching.token_map(part, (frames, h, w), key))
        if image_first and text:
            maps.append(nothing_merged(x[:, start:]))
        joined = maps[0] if len(maps) == 1 else side_by_side(maps)
        return joined if len(x) == batch else joined.repeat(batch)

    def _heads_positions(self, tables: Any, token_map: TokenMap) -> Any:
        """The rotary tables of the merged tokens: a token turns by the angle of its head."""
        at, dim = self.kind.rotary_at, self.kind.rotary_dim
        if at is None:
            return _followed(tables, token_map, dim)
        return *tables[:at], _followed(tables[at], token_map, dim), *tables[at + 1 :]

    def weigh_keys(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if self.model.run.map is None:
            return args, kwargs
        given = by_name(self.attention_names, args, kwargs)
        mask, bias = given.get("attention_mask"), self.model.run.bias
        if mask is not None and not self.kind.mask:
            raise ValueError(_MASKED)
        if mask is not None and bias is not None:
            mask = mask.view(len(mask), *(1,) * (bias.dim() - mask.dim()), *mask.shape[1:])
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if bias is not None:
            mask = fit_bias(bias, attention, given[self.attention_names[0]].shape[1])
        given["attention_mask"] = mask
        return _as_called(self.attention_names, args, given)

    def give_back(self, projection: nn.Module, args: tuple, output: Tensor) -> Tensor:
        token_map = self.model.run.map
        return output if token_map is None else token_map.unmerge(output)

    def unmerge(self, block: nn.Module, args: tuple, output: Any) -> Any:
        run, at = self.model.run, self.kind.output
        x, token_map, merged = run.x, run.map, run.merged
        run.x = run.map = run.merged = run.bias = None
        # There is no output after an error.
        if token_map is None or output is None:
            return output
        y = output if at is None else output[at]
        # Into the unmerged copy, so that no more than the unpatched block's sums is kept.
        y = token_map.unmerge(y - merged).add_(x)
        return y if at is None else (*output[:at], y, *output[at + 1 :])


_MASKED = (
    "attention_mask on self-attention cannot be combined with merged tokens; remove_patch first, "
    "or leave attention_mask=None: one prompt at a time where it comes from prompts of several "
    "lengths"
)
_CACHED = (
    "a cache must not be enabled while tokens merge, got one: what it keeps from step to step "
    "would be of other tokens; disable_cache() on the model"
)


def _as_called(names: tuple[str, ...], args: tuple, given: dict) -> tuple[tuple, dict]:
    """Arguments by position and by name, as the host gave them."""
    return tuple(given.pop(name) for name in names[: len(args)]), given


def _followed(tables: Any, token_map: TokenMap, dim: int) -> Any:
    if isinstance(tables, Tensor):
        return _heads(tables, token_map, dim)
    return tuple(_heads(table, token_map, dim) for table in tables)


def _heads(table: Tensor, token_map: TokenMap, dim: int) -> Tensor:
    """The rows of a table that belong to the heads, and all that come before the map's tokens."""
    table = table.to(token_map.size.device)  # CogView4 makes its angles on the CPU.
    lead = table.shape[dim] - token_map.n
    if dim == 0:
        rows = token_map.head_rows[0] + lead
        return table.index_select(0, torch.cat([torch.arange(lead, device=rows.device), rows]))
    batch = len(token_map.size)
    rows = (token_map.head + lead).view(
        batch, *(1,) * (dim - 1), -1, *(1,) * (table.dim() - dim - 1)
    )
    rows = rows.expand(-1, *table.shape[1:dim], -1, *table.shape[dim + 1 :])
    table = table.expand(batch, *table.shape[1:])
    return torch.cat([table.narrow(dim, 0, lead), table.gather(dim, rows)], dim=dim)


def _of_keys(mask: Tensor, token_map: TokenMap, beside: tuple[int, int]) -> Tensor:
    """A mask [B, ..., keys] of the merged keys; beside the image's are so many before and after."""
    batch, (before, after) = len(token_map.size), beside
    keys = torch.arange(mask.shape[-1], device=mask.device).expand(batch, -1)
    end = mask.shape[-1] - after
    keys = torch.cat([keys[:, :before], token_map.head + before, keys[:, end:]], dim=1)
    keys = keys.view(batch, *(1,) * (mask.dim() - 2), -1).expand(-1, *mask.shape[1:-1], -1)
    return mask.expand(batch, *mask.shape[1:]).gather(-1, keys)
