"""The hooks on one block of a UNet."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.core.partition import make_key
from tomesd.core.token_map import TokenMap
from tomesd.diffusion.attention_bias import fit_bias
from tomesd.diffusion.block import ThreadState, add_residual
from tomesd.diffusion.conflicts import cache_of, fused_projections_error
from tomesd.diffusion.matcher import Matcher
from tomesd.diffusion.processors import (
    KeyProjections,
    explain,
    foreign_keys_error,
    is_perturbed,
    is_stock,
)
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.levels import Transformer, why_block_whole
from tomesd.hooks import by_name

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# The arguments of BasicTransformerBlock in order: gradient checkpointing passes them by position.
_BLOCK_ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
)

# Attention processors that add the bias to float32 logits if the model says upcast_attention.
_UPCASTING = ("AttnProcessor", "SlicedAttnProcessor")


@dataclass(eq=False)
class BlockHooks:
    """The hooks of one transformer block.

    match and finish run around the block, the others around its branches. projections: of keys
    and values in self-attention, if there are any.
    """

    index: int
    matcher: Matcher
    transformer: Transformer
    projections: KeyProjections | None = None

    @property
    def block_arguments(self) -> tuple[str, ...]:
        return _BLOCK_ARGUMENTS

    @property
    def settings(self) -> DiffusionSettings:
        return self.matcher.settings

    @property
    def state(self) -> ThreadState:
        return self.transformer.threads.state

    @property
    def map(self) -> TokenMap | None:
        """The token map of the block that this thread is running; None if nothing merges."""
        return self.state.map

    def match(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        given = by_name(self.block_arguments, args, kwargs)
        place = self.transformer.place(given)
        x = given.pop("hidden_states")
        if (given.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
            self._check_masks()
        check_caches(block, self.settings)
        self.state.leave_block()  # An interrupted forward may have left a map.
        (_, h, w), ratio = place.grids[0], self.transformer.ratio.at(place.stage)
        finest = self.transformer.finest
        if self.matcher.why_not(ratio, x.device, x.shape[0], h, w, x.shape[2], finest=finest):
            return (x,), given
        if why_block_whole(block, self.settings):
            return (x,), given
        key = None
        if self.matcher.is_random:
            key = make_key(self.settings.seed, place.timestep, self.index).to(x.device)
        self.state.map = self.matcher.token_map(x, h, w, ratio, key)
        if self.settings.merge_block and is_stock(block.attn2):
            x = self.state.merge_block(x, self.state.map)
        return (x,), given

    def _check_masks(self) -> None:
        # They say for each position of the image which reference it attends to.
        for name in ("merge_block", "merge_crossattn"):
            if getattr(self.settings, name):
                raise ValueError(
                    f"{name} must be False with ip_adapter_masks, got True: masks need every token "
                    "in cross-attention; apply_patch(..., merge_attn=True) merges self-attention"
                )

    def finish(self, block: Any, args: Args, output: Tensor | None) -> Tensor | None:
        token_map = self.state.map
        # First: gradient checkpointing may end in the middle of what follows.
        merged = self.state.leave_block()
        if output is None and token_map is not None:  # There is no output after an error.
            explain([block.attn1, block.attn2], token_map.n, token_map.m)
        return output if output is None or merged is None else add_residual(*merged, output)

    def merge_self_attention(self, attn: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        token_map, settings = self.map, self.settings
        if token_map is None:
            return args, kwargs
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask on self-attention cannot be combined with merged tokens; "
                "remove_patch first, or leave attention_mask=None"
            )
        if not settings.merge_queries and is_perturbed(attn):
            raise ValueError(
                "merge_queries must be True with perturbed-attention guidance, whose processors "
                "have no separate keys, got False: apply_patch(..., merge_attn=True) or the "
                "defaults merge queries too"
            )
        if not settings.merge_queries and attn.fused_projections:
            raise fused_projections_error("merge_queries", False)
        given_keys = kwargs.get("encoder_hidden_states") is not None
        if given_keys and self.state.merged is not None and self.matcher.weighs_keys:
            raise ValueError(
                "encoder_hidden_states of self-attention must be None while whole blocks merge, "
                f"got {list(kwargs['encoder_hidden_states'].shape)}: their group sizes are "
                "unknown; apply_patch(..., merge_attn=True) leaves such keys as they are"
            )
        if self.state.merged is None:
            x, *rest = args
            if settings.merge_queries:
                args = self._merged(x), *rest
            elif not given_keys:
                kwargs = kwargs | {"encoder_hidden_states": self._merged(x)}
        if given_keys or not self.matcher.weighs_keys:
            return args, kwargs
        if not is_stock(attn):
            own = kwargs.get("encoder_hidden_states")
            self._follow_keys(attn, args[0] if own is None else own)
            return args, kwargs
        bias = _log_size(token_map, attn, args[0].dtype)
        return args, kwargs | {"attention_mask": fit_bias(bias, attn, args[0].shape[1])}

    def _merged(self, x: Tensor) -> Tensor:
        """The input of a branch, after a norm."""
        assert self.map is not None
        # A block that should merge as a whole, but for what its cross-attention needs.
        how = "direction" if self.settings.merge_block else self.matcher.combine
        return self.map.merge(x, how=how)

    def _follow_keys(self, attn: Any, tokens: Tensor) -> None:
        """Let the keys and values that are projected of these tokens be unmerged."""
        if self.projections is None:
            raise TypeError(
                f"{type(attn.processor).__name__} cannot be combined with merged tokens: its "
                "attention has no to_k and to_v; apply_patch(..., prop_attn=False)"
            )
        self.state.keys = tokens
        self.projections.follow(attn, (), {})

    def unmerge_keys(self, attn: Any, tokens: Tensor, keys: Tensor) -> Tensor:
        token_map, given = self.map, self.state.keys
        if token_map is None or given is None:
            return keys
        if tokens is not given:
            raise foreign_keys_error(attn, given, tokens)
        return token_map.unmerge(keys)

    def unmerge_self_attention(self, attn: Any, args: Args, output: Tensor) -> Tensor:
        self.state.keys = None
        if self.map is None or self.state.merged is not None or not self.settings.merge_queries:
            return output
        return self.map.unmerge(output)

    def weigh_keys_beside_objects(
        self, attn: Any, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """GLIGEN's own attention has objects among its keys, after the tokens of the image."""
        token_map = self.map
        if token_map is None or self.state.merged is None:
            return args, kwargs
        if not is_stock(attn):
            raise ValueError(
                "the processor of GLIGEN's attention must be diffusers' own while tokens merge, "
                f"got {type(attn.processor).__name__}: apply_patch(..., merge_attn=True) leaves "
                "that attention as it is"
            )
        bias = _log_size(token_map, attn, args[0].dtype)
        bias = nn.functional.pad(bias, (0, args[0].shape[1] - bias.shape[2]))
        return args, kwargs | {"attention_mask": fit_bias(bias, attn, args[0].shape[1])}

    def merge(self, branch: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        (x, *rest), token_map = args, self.map
        # Other processors of cross-attention may need every token: to keep maps, to mask regions.
        if token_map is not None and is_stock(branch):
            x = token_map.merge(x, how=self.matcher.combine)
        return (x, *rest), kwargs

    def unmerge(self, branch: nn.Module, args: Args, output: Tensor) -> Tensor:
        token_map = self.map
        return output if token_map is None or not is_stock(branch) else token_map.unmerge(output)


def check_caches(block: Any, settings: DiffusionSettings) -> None:
    """Raise ValueError if a cache hands out what an earlier step gave for other merged tokens."""
    whole = settings.merge_block
    for name, module, merges in (
        ("block", block, whole),
        ("attn1", block.attn1, whole or (settings.merge_attn and settings.merge_queries)),
        ("attn2", block.attn2, whole or settings.merge_crossattn),
        ("ff", block.ff, whole or settings.merge_mlp),
    ):
        cache = cache_of(module) if merges else None
        if cache:
            raise ValueError(
                f"{name} must not be cached while its tokens merge, got {cache}: the output of an "
                "earlier step is for other tokens; remove the cache, or merge keys only, "
                'apply_patch(..., preset="quality")'
            )


def _log_size(token_map: TokenMap, attn: Any, dtype: torch.dtype) -> Tensor:
    """The bias of each key, [B, 1, M]: the same for every head and query."""
    bias = token_map.size.log().transpose(1, 2)
    name = type(attn.processor).__name__
    if is_perturbed(attn):
        # The last third of the batch (half of it without guidance) attends to itself alone.
        attending, of = (2, 3) if name.startswith("PAGCFG") else (1, 2)
        bias = bias[: bias.shape[0] * attending // of]
    return bias if attn.upcast_attention and name in _UPCASTING else bias.to(dtype)
