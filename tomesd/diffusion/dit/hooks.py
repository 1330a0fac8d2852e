"""The hooks on the blocks of a diffusion transformer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.core.frames import concatenate
from tomesd.core.partition import make_key
from tomesd.core.rows import fixed
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.attention_bias import fit_bias
from tomesd.diffusion.block import Place, add_residual, pop_place
from tomesd.diffusion.conflicts import check_cache, check_guidance, is_skipped
from tomesd.diffusion.dit.heads import (
    first_samples,
    mask_of_heads,
    own_entries,
    tables_of_heads,
)
from tomesd.diffusion.dit.model_hooks import Args, Given, ModelHooks, as_called
from tomesd.diffusion.dit.override import Weighing, overriding
from tomesd.diffusion.dit.spec import Bias, Blocks, Override, UnmergeKeys
from tomesd.diffusion.dit.video import VideoMatcher
from tomesd.diffusion.processors import (
    KeyProjections,
    attending,
    explain,
    foreign_keys_error,
    is_stock,
)
from tomesd.diffusion.ratio_plan import LevelRatio
from tomesd.hooks import by_name


@dataclass(eq=False)
class BlockHooks:
    """The hooks of one block.

    counts: of image tokens and of query–key pairs, before and after merging, in the last forward.
    why_not: why nothing merged in it; empty if something did.
    text_first: whether text tokens came before those of the image in it.
    unweighed: why its merged keys counted as one token each, where that shows in its forward only.
    first_image: how many tokens the first grid had after merging.
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
    unweighed: str = ""
    first_image: int = 0

    @property
    def weighs_keys(self) -> bool:
        return self.matcher.frame.weighs_keys

    def unmerges_keys(self, block: nn.Module) -> bool:
        """Whether keys are unmerged: always, or for a processor that is not the host's own."""
        kind = self.kind
        return self.weighs_keys and (
            isinstance(kind.proportional, UnmergeKeys)
            or (kind.can_unmerge_keys and not all(map(is_stock, kind.attentions(block))))
        )

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
            return as_called(self.names, args, given)
        why_not = kind.why_not(given, self.matcher.frame.settings)
        if why_not:
            self.why_not, n = why_not, sum(f * h * w for f, h, w in kind.own(place.grids))
            self.counts = n, n, n**2, n**2
            return as_called(self.names, args, given)
        first = self.text_first = self._text_first(given)
        token_map = self._match(x, place, first)
        together = kind.text is not None and not kind.text.argument
        if together and not kind.mask and given.get("attention_mask") is not None:
            raise ValueError(_MASKED)
        beside = kind.text and kind.text.argument
        text = fixed(given[beside].shape[1]) if beside else 0
        self._count(block, place, token_map, text)
        if token_map.m == token_map.n:
            return as_called(self.names, args, given)
        for attention in kind.attentions(block):
            check_guidance(attention, merges_queries=True, merges_keys=True)
        if given.get(kind.adds_first) is not None:
            x = x + given[kind.adds_first]
            given[kind.adds_first] = None
        merged = state.merge_block(x, token_map)
        if kind.adds_in_place:
            merged = merged.clone()
        given[kind.tokens] = merged if kind.batch_first else merged.transpose(0, 1)
        if given.get(kind.adds_last) is not None:
            state.x = x + given[kind.adds_last]
            given[kind.adds_last] = None
        self._merge_beside(given, token_map, text, first)
        if isinstance(kind.proportional, (Bias, Override)) and self.weighs_keys:
            log_size = nn.functional.pad(token_map.size[..., 0].log(), _beside(text, first))
            log_size = log_size.to(x.dtype)
            ndim = kind.proportional.ndim if isinstance(kind.proportional, Bias) else 4
            state.bias = log_size.view(log_size.shape[0], *(1,) * (ndim - 2), -1)
        if not kind.attention:
            self._replace_attention(given)
        return as_called(self.names, args, given)

    def _text_first(self, given: Given) -> bool:
        text = self.kind.text
        return text is None or (text.first and given.get(text.last_with) is None)

    def _count(self, block: nn.Module, place: Place, token_map: TokenMap, text: int) -> None:
        n = sum(f * h * w for f, h, w in self.kind.own(place.grids))
        before, after = text + token_map.n, text + token_map.m
        pairs = after * (before if self.unmerges_keys(block) else after)
        self.counts = n, n - before + after, before**2, pairs

    def _match(self, x: Tensor, place: Place, first: bool) -> TokenMap:
        """The token map of a block's tokens; text tokens among them stay as they are."""
        kind, batch = self.kind, x.shape[0]
        grids = kind.own(place.grids)
        n = sum(f * h * w for f, h, w in grids)
        text = fixed(x.shape[1]) - n
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
        # A step with ratio 0 is as planned, and says nothing about the image.
        self.why_not = "" if "" in reasons or not ratio else reasons[0]
        self.first_image = maps[1 if before else 0].m
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
                given[name] = tables_of_heads(tables, token_map, dim, first)
            else:
                own = tables_of_heads(tables[at], token_map, dim, first)
                given[name] = (*tables[:at], own, *tables[at + 1 :])
        for name, dim in kind.per_token:
            value = given.get(name)
            if isinstance(value, list):
                given[name] = [own_entries(each, token_map, dim) for each in value]
            elif value is not None:
                given[name] = own_entries(value, token_map, dim)
        if given.get(kind.first_image) is not None:
            given[kind.first_image] = self.first_image
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
            bias = bias[: attending(attention, bias.shape[0])]
            mask = fit_bias(bias, attention, given[self.attention_names[0]].shape[1])
        given[how.argument] = mask
        return as_called(self.attention_names, args, given)

    def replace_attention(
        self, attention: nn.Module, args: Args, kwargs: Given
    ) -> tuple[Args, Given]:
        given = by_name(self.attention_names, args, kwargs)
        self._replace_attention(given)
        return as_called(self.attention_names, args, given)

    def _replace_attention(self, given: Given) -> None:
        """Let attention that is given these arguments add log(size), if its host can."""
        how, token_map, bias = self.kind.proportional, self.model.state.map, self.model.state.bias
        if isinstance(how, Override) and token_map is not None and bias is not None:
            own = slice(-token_map.m, None) if self.text_first else slice(token_map.m)
            weighing = Weighing(bias, own, partial(setattr, self, "unweighed"))
            given[how.argument] = overriding(given.get(how.argument), weighing)

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
        return first_samples(token_map, keys.shape[0]).unmerge(keys)

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
