"""The hooks on a diffusion transformer and its blocks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.core.frames import concatenate
from tomesd.core.partition import make_key
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.attention_bias import fit_bias
from tomesd.diffusion.block import Place, ThreadState, add_residual, pop_place
from tomesd.diffusion.conflicts import check_cache, check_guidance, is_skipped
from tomesd.diffusion.dit.heads import first_samples, head_entries, mask_of_heads
from tomesd.diffusion.dit.spec import Bias, Blocks, DiT, UnmergeKeys
from tomesd.diffusion.dit.video import VideoMatcher
from tomesd.diffusion.processors import (
    KeyProjections,
    attending,
    explain,
    foreign_keys_error,
    is_stock,
)
from tomesd.diffusion.ratio_plan import LevelRatio
from tomesd.hooks import PerThread, by_name

Args = tuple[Any, ...]
Given = dict[str, Any]


@dataclass(eq=False)
class ModelHooks:
    """The hooks on the model itself.

    last: the place of the last forward pass of any thread, for reports, and for a block that
        autograd calls again in a thread of its own.
    """

    spec: DiT
    threads: PerThread[ThreadState]
    names: tuple[str, ...]
    last: Place | None = None

    @property
    def state(self) -> ThreadState:
        return self.threads.state

    @property
    def place(self) -> Place | None:
        """The forward pass that this thread is in, or was in when autograd calls a block again."""
        # Another model may share blocks, and call them outside of this one's forward.
        inside = self.state.inside or torch.compiler.is_compiling()
        if not inside and torch._C._current_graph_task_id() < 0:
            return None
        return self.state.place or self.last

    def leave(self, model: nn.Module, args: Args, output: Any) -> None:
        self.state.inside = False

    def record_place(self, model: nn.Module, args: Args, kwargs: Given) -> tuple[Args, Given]:
        recorded, self.state.grids = self.state.grids, None
        check_cache(model)
        given = by_name(self.names, args, kwargs)
        timestep = given[self.spec.timestep]
        grids = recorded or self.spec.grids(model, given)
        place = Place(grids, timestep, self.state.stage)
        self.state.place = self.last = place
        self.state.inside = True
        if self.spec.kwargs:
            given[self.spec.kwargs] = place.add_to(given.get(self.spec.kwargs))
        return _as_called(self.names, args, given)

    def append_place(self, rope: nn.Module, args: Args, output: Any) -> Any:
        if self.place is None:
            return output
        return self.place.add_to(output) if isinstance(output, dict) else (*output, self.place)


@dataclass(eq=False)
class BlockHooks:
    """The hooks of one block.

    counts: of image tokens and of query–key pairs, before and after merging, in the last forward.
    why_not: why nothing merged in it; empty if something did.
    text_first: whether text tokens came before those of the image in it.
    """

    index: int
    kind: Blocks
    matcher: VideoMatcher
    ratio: LevelRatio
    model: ModelHooks
    names: tuple[str, ...]
    attention_names: tuple[str, ...]
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    why_not: str = ""
    text_first: bool = True

    @property
    def weighs_keys(self) -> bool:
        return self.matcher.frame.weighs_keys

    @property
    def unmerges_keys(self) -> bool:
        return isinstance(self.kind.proportional, UnmergeKeys) and self.weighs_keys

    def merge(self, block: nn.Module, args: Args, kwargs: Given) -> tuple[Args, Given]:
        kind, state = self.kind, self.model.state
        given = by_name(self.names, args, kwargs)
        x = given[kind.tokens]
        x = x if kind.batch_first else x.transpose(0, 1)
        check_cache(block, *block.children())
        carrier = kind.carrier
        place = pop_place(given, carrier) if carrier else self.model.place
        state.leave_block()  # An interrupted forward may have left a map.
        if place is None or is_skipped(block):
            return _as_called(self.names, args, given)
        first = self.text_first = self._text_first(given)
        token_map = self._match(x, place, first)
        together = kind.text is not None and not kind.text.argument
        if together and not kind.mask and given.get("attention_mask") is not None:
            raise ValueError(_MASKED)
        text = given[kind.text.argument].shape[1] if kind.text and kind.text.argument else 0
        self._count(place, token_map, text)
        if token_map.m == token_map.n:
            return _as_called(self.names, args, given)
        for attention in kind.attentions(block):
            check_guidance(attention, merges_queries=True, merges_keys=True)
        if given.get(kind.adds_first) is not None:
            x = x + given[kind.adds_first]
            given[kind.adds_first] = None
        merged = state.merge_block(x, token_map)
        given[kind.tokens] = merged if kind.batch_first else merged.transpose(0, 1)
        if given.get(kind.adds_last) is not None:
            state.x = x + given[kind.adds_last]
            given[kind.adds_last] = None
        self._merge_beside(given, token_map, text, first)
        if isinstance(kind.proportional, Bias) and self.weighs_keys:
            log_size = nn.functional.pad(token_map.size[..., 0].log(), _beside(text, first))
            log_size = log_size.to(x.dtype)
            ndim = kind.proportional.ndim
            state.bias = log_size.view(log_size.shape[0], *(1,) * (ndim - 2), -1)
        return _as_called(self.names, args, given)

    def _text_first(self, given: Given) -> bool:
        text = self.kind.text
        return text is None or (text.first and given.get(text.last_with) is None)

    def _count(self, place: Place, token_map: TokenMap, text: int) -> None:
        n = sum(f * h * w for f, h, w in self.kind.own(place.grids))
        before, after = text + token_map.n, text + token_map.m
        pairs = after * (before if self.unmerges_keys else after)
        self.counts = n, n - before + after, before**2, pairs

    def _match(self, x: Tensor, place: Place, first: bool) -> TokenMap:
        """The token map of a block's tokens; text tokens among them stay as they are."""
        kind, batch = self.kind, x.shape[0]
        grids = kind.own(place.grids)
        n = sum(f * h * w for f, h, w in grids)
        text = x.shape[1] - n
        alone = kind.text is None or (kind.text.argument and not kind.padded)
        if text < 0 or (text and alone):
            raise ValueError(
                f"{kind.tokens} of block {self.index} must have the tokens of the grids "
                f"{grids} (frames, height, width), got {x.shape[1]} tokens"
            )
        matcher, key, channels = self.matcher.frame, None, x.shape[2]
        if matcher.is_random:
            key = make_key(matcher.settings.seed, place.timestep, self.index).to(x.device)
        if kind.rotary and kind.rotary.dim == 0:
            # One map for all samples, since they share one table of angles. The cosine of all
            # samples' features side by side is the mean of their cosines, weighted by norms: what
            # merges is alike in every sample, and a single sample merges as if it were alone.
            x = x.movedim(0, 1).flatten(1)[None]
        before, after = _beside(text, first)
        maps = [TokenMap.identity(x[:, :before])] if before else []
        start, ratio, reasons = before, self.ratio.at(place.stage), []
        for frames, h, w in grids:
            part = x[:, start : start + frames * h * w]
            start += frames * h * w
            reason = matcher.why_not(
                ratio, x.device, batch * frames, h, w, channels, joint=kind.text is not None
            )
            reasons.append(reason)
            if reason:
                maps.append(TokenMap.identity(part))
            else:
                maps.append(self.matcher.token_map(part, (frames, h, w), ratio, key))
        self.why_not = "" if "" in reasons else reasons[0]
        if after:
            maps.append(TokenMap.identity(x[:, start:]))
        joined = maps[0] if len(maps) == 1 else concatenate(maps)
        return joined if x.shape[0] == batch else joined.repeat(batch)

    def _merge_beside(self, given: Given, token_map: TokenMap, text: int, first: bool) -> None:
        """Let position tables and masks follow the merged tokens: they take those of the heads."""
        kind = self.kind
        if kind.rotary and given.get(kind.rotary.argument) is not None:
            name, dim, at = kind.rotary
            tables = given[name]
            if at is None:
                given[name] = _entries(tables, token_map, dim, first)
            else:
                own = _entries(tables[at], token_map, dim, first)
                given[name] = (*tables[:at], own, *tables[at + 1 :])
        for name, dim in kind.per_token:
            value = given.get(name)
            if isinstance(value, list):
                given[name] = [_own_entries(each, token_map, dim) for each in value]
            elif value is not None:
                given[name] = _own_entries(value, token_map, dim)
        if given.get(kind.mask) is not None:
            given[kind.mask] = mask_of_heads(given[kind.mask], token_map, _beside(text, first))

    def weigh_keys(
        self, projections: KeyProjections | None, attention: nn.Module, args: Args, kwargs: Given
    ) -> tuple[Args, Given]:
        how, bias = self.kind.proportional, self.model.state.bias
        if self.model.state.map is None or not isinstance(how, Bias):
            return args, kwargs
        given = by_name(self.attention_names, args, kwargs)
        mask = given.get(how.argument)
        if mask is not None and not self.kind.mask:
            raise ValueError(_MASKED)
        if projections is not None and not is_stock(attention):
            return self.note_keys(projections, attention, args, kwargs)
        if mask is not None and bias is not None:
            mask = mask.view(mask.shape[0], *(1,) * (bias.dim() - mask.dim()), *mask.shape[1:])
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if bias is not None:
            bias = bias[: attending(attention, len(bias))]
            mask = fit_bias(bias, attention, given[self.attention_names[0]].shape[1])
        given[how.argument] = mask
        return _as_called(self.attention_names, args, given)

    def note_keys(
        self, projections: KeyProjections, attention: nn.Module, args: Args, kwargs: Given
    ) -> tuple[Args, Given]:
        """Keys and values of this attention are unmerged: from which tokens they must be made."""
        projections.follow(attention, args, kwargs)
        given = by_name(self.attention_names, args, kwargs)
        self.model.state.keys = given[self.attention_names[0]]
        return args, kwargs

    def unmerge_keys(self, attention: Any, tokens: Tensor, keys: Tensor) -> Tensor:
        """Keys or values of all samples, or of the first."""
        token_map, given = self.model.state.map, self.model.state.keys
        if token_map is None or given is None:
            return keys
        if not is_stock(attention) and tokens is not given:
            raise foreign_keys_error(attention, given, tokens)
        return first_samples(token_map, len(keys)).unmerge(keys)

    def finish(self, block: nn.Module, args: Args, output: Any) -> Any:
        merged, index = self.model.state.leave_block(), self.kind.output
        if merged is not None and output is None:  # There is no output after an error.
            token_map = merged[0]
            explain(self.kind.attentions(block), token_map.n, token_map.m)
        if merged is None or output is None:
            return output
        if not self.kind.batch_first:
            return add_residual(*merged, output.transpose(0, 1)).transpose(0, 1)
        if index is None:
            return add_residual(*merged, output)
        return *output[:index], add_residual(*merged, output[index]), *output[index + 1 :]


_MASKED = (
    "attention_mask on self-attention cannot be combined with merged tokens; remove_patch first, "
    "or leave attention_mask=None: pass one prompt at a time if it comes from prompts of several "
    "lengths"
)


def _beside(text: int, first: bool) -> tuple[int, int]:
    """How many text tokens come before and after the image tokens among the keys."""
    return (text, 0) if first else (0, text)


def _as_called(names: tuple[str, ...], args: Args, given: Given) -> tuple[Args, Given]:
    """Arguments by position and by name, as the host passed them."""
    return tuple(given.pop(name) for name in names[: len(args)]), given


def _own_entries(value: Tensor, token_map: TokenMap, dim: int) -> Tensor:
    """Those of the heads, if there is an entry for each token."""
    own = value.dim() > dim and value.shape[dim] == token_map.n
    return head_entries(value, token_map, dim) if own else value


def _entries(tables: Any, token_map: TokenMap, dim: int, first: bool) -> Any:
    if isinstance(tables, Tensor):
        return head_entries(tables, token_map, dim, first)
    if isinstance(tables, dict):
        return {key: head_entries(table, token_map, dim, first) for key, table in tables.items()}
    return tuple(head_entries(table, token_map, dim, first) for table in tables)
