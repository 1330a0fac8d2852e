"""Token merging in the original UNet (CompVis's ldm) and what copied it, by forward hooks alone.

Stability's sgm, ComfyUI, Forge and Fooocus have the same parts: `input_blocks`, `middle_block` and
`output_blocks` of `SpatialTransformer`s, whose blocks have `attn1`, `attn2` and `ff`. What differs
from diffusers:

- Blocks add in place (Forge), so what a block was given is not what it was when it returns.
- Gradient checkpointing is inside a block: it runs attention again, but not the block's own hooks.
- Attention takes log(size) in another way in each of them (`ldm_attention`).
- In ComfyUI and Forge, other extensions hand patches for single blocks along in
  `transformer_options`, which may want every token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tomesd.core.token_map import TokenMap
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet.hooks import BlockHooks
from tomesd.diffusion.unet.ldm_attention import Way, add_feature, way_of
from tomesd.diffusion.unet.levels import Transformer
from tomesd.diffusion.unet.patch import UNetPatch
from tomesd.diffusion.unet.spec import UNet
from tomesd.hooks import argument_names
from tomesd.reports import ReportRow

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Patches of other extensions that see a block's tokens.
_PATCHES = (
    "attn1_patch",
    "attn1_output_patch",
    "attn2_patch",
    "attn2_output_patch",
    "middle_patch",
)


@dataclass(frozen=True)
class LDMUNet(UNet):
    """How a UNet with CompVis's layout (input_blocks, middle_block, output_blocks) is hooked.

    >>> tomesd.register(LDMUNet(), "my_package.MyUNetModel")

    The fields are those of `UNet`.
    """

    transformers: Mapping[str, str] = field(
        default_factory=lambda: {"SpatialTransformer": "", "SpatialVideoTransformer": ""}
    )
    sample: str = "x"
    timestep: str = "timesteps"

    def stages(self, model: Any) -> Iterator[tuple[str, int, list[Any]]]:
        factor = 1
        for i, block in enumerate(model.input_blocks):
            yield f"input_blocks.{i}", factor, _transformers(block)
            factor *= 2 if _has(block, "Downsample") else 1
        if model.middle_block is not None:
            yield "middle_block", factor, _transformers(model.middle_block)
        for i, block in enumerate(model.output_blocks):
            yield f"output_blocks.{i}", factor, _transformers(block)
            factor //= 2 if _has(block, "Upsample") else 1

    def check_block(self, block: Any, settings: DiffusionSettings) -> None:
        """They can follow all settings."""

    def has_self_attention(self, block: Any) -> bool:
        return not getattr(block, "disable_self_attn", False)

    def width(self, transformer: Any) -> int:
        return int(transformer.transformer_blocks[0].norm1.normalized_shape[0])

    def sample_size(self, model: Any) -> tuple[int, int]:
        return 0, 0  # image_size is 32 in the configuration of Stable Diffusion, which takes 64.


@dataclass(eq=False)
class LDMBlockHooks(BlockHooks):
    """The hooks of one transformer block.

    names: of the block's arguments. heads: of its attention. way: how log(size) gets onto the
    logits. recent: the token map of the last forward with gradients, for attention that
    checkpointing runs again. whole: whether all of the block runs on merged tokens in this forward.
    """

    names: tuple[str, ...] = ()
    heads: int = 1
    way: Way = Way.UNMERGE
    recent: TokenMap | None = None
    whole: bool = False

    @property
    def block_arguments(self) -> tuple[str, ...]:
        return self.names

    @property
    def map(self) -> TokenMap | None:
        return self.state.map or self.recent

    def match(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self.recent = None
        x = args[0]
        beside = _patches_of_others(kwargs.get("transformer_options") or {})
        self.transformer.beside = beside
        (merged,), given = super().match(block, args, kwargs)
        self.whole = self.settings.merge_block and not beside
        if self.settings.merge_block and beside:
            # They may want every token of the block, but self-attention can merge all the same.
            self.state.x = self.state.merged = None
            merged = x
        elif merged is not x:
            merged = merged.clone()  # Blocks add in place.
        if torch.is_grad_enabled():
            self.recent = self.state.map
        return (merged,), given

    def merge_self_attention(self, attn: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        token_map = self.map
        self.state.bias = None
        if token_map is None:
            return args, kwargs
        x, *rest = args
        # A patch of others has given keys and values apart: those stay whole.
        apart = kwargs.get("context") is not None
        if not self.whole:
            merged = token_map.merge(x, how=self.matcher.combine)
            if self.settings.merge_queries:
                args = merged, *rest
            elif not apart:
                kwargs = kwargs | {"context": merged}
        return args, kwargs if apart else self._weigh(token_map, attn, args[0].dtype, kwargs)

    def weigh_without_context(self, attn: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Cross-attention without a context is self-attention on the block's own tokens."""
        token_map = self.map
        self.state.bias = None
        if token_map is None or kwargs.get("context") is not None:
            return args, kwargs
        return args, self._weigh(token_map, attn, args[0].dtype, kwargs)

    def _weigh(self, token_map: TokenMap, attn: Any, dtype: torch.dtype, kwargs: Kwargs) -> Kwargs:
        if kwargs.get("mask") is not None:
            raise ValueError(
                "mask on self-attention cannot be combined with merged tokens; remove_patch first, "
                "or leave mask=None"
            )
        if not self.matcher.weighs_keys:
            return kwargs
        bias = token_map.size.log()
        if not torch.compiler.is_compiling():
            self.way = way_of(attn)
        overridden = "optimized_attention_override" in (kwargs.get("transformer_options") or {})
        if self.way is Way.MASK and not overridden:
            return kwargs | {"mask": bias.to(dtype).transpose(1, 2)[:, None]}
        self.state.bias = bias / attn.scale if self.way is Way.FEATURE else bias
        return kwargs

    def project_queries(self, linear: nn.Module, args: Args, output: Tensor) -> Tensor:
        if self.state.bias is None or self.way is not Way.FEATURE:
            return output
        return add_feature(output, self.heads, 1.0)

    def project_keys(self, linear: nn.Module, args: Args, output: Tensor) -> Tensor:
        if self.state.bias is None or self.way is not Way.FEATURE:
            return self.project_values(linear, args, output)
        return add_feature(output, self.heads, self.state.bias)

    def project_values(self, linear: nn.Module, args: Args, output: Tensor) -> Tensor:
        token_map = self.map
        if self.state.bias is None or token_map is None or self.way is Way.FEATURE:
            return output
        return token_map.unmerge(output)

    def leave_attention(self, attn: nn.Module, args: Args, output: Tensor) -> Tensor:
        self.state.bias = None
        return output

    def leave_self_attention(self, attn: nn.Module, args: Args, output: Tensor) -> Tensor:
        self.state.bias = None
        merges = not self.whole and self.settings.merge_queries
        return self.unmerge(attn, args, output) if merges else output


class LDMPatch(UNetPatch):
    """Token merging in one UNet of CompVis's layout.

    >>> patch = LDMPatch(LDMUNet(), unet, DiffusionSettings())
    >>> patch.install()

    The arguments are those of `UNetPatch`.
    """

    blocks: dict[nn.Module, LDMBlockHooks]  # type: ignore[assignment]

    def check_weighs_keys(self, attention: Any) -> None:
        if not self.settings.merge_queries and way_of(attention) is Way.UNMERGE:
            raise ValueError(
                f"prop_attn must be False with merge_queries=False and {type(attention).__name__} "
                f"of {type(attention).__module__}, which takes no bias on its keys, got True"
            )

    def hooks_of(self, block: Any, found: Transformer) -> BlockHooks:
        names = "hidden_states", *argument_names(block)[1:]
        heads, way = block.attn1.heads, way_of(block.attn1)
        return LDMBlockHooks(
            len(self.blocks), self.matcher, found, names=names, heads=heads, way=way
        )

    def install_block(self, block: Any, hooks: LDMBlockHooks) -> None:  # type: ignore[override]
        settings, weighs = self.settings, self.matcher.weighs_keys
        self.blocks[block] = hooks
        self.before(block, hooks.match)
        if not settings.merge_block:
            branches = [block.attn2] if settings.merge_crossattn and block.attn2 is not None else []
            for branch in branches + [block.ff] * settings.merge_mlp:
                self.before(branch, hooks.merge)
                self.after(branch, hooks.unmerge)
        if settings.merge_attn and self.spec.has_self_attention(block):
            self.before(block.attn1, hooks.merge_self_attention)
            self._install_projections(block.attn1, hooks, weighs)
            self.after(block.attn1, hooks.leave_self_attention)
        crosses = settings.merge_block or settings.merge_crossattn
        if crosses and weighs and block.attn2 is not None:
            self.before(block.attn2, hooks.weigh_without_context)
            self._install_projections(block.attn2, hooks, weighs)
            self.after(block.attn2, hooks.leave_attention)
        self.after(block, hooks.finish, always=True)

    def _install_projections(self, attention: Any, hooks: LDMBlockHooks, weighs: bool) -> None:
        if weighs:
            self.after(attention.to_q, hooks.project_queries)
            self.after(attention.to_k, hooks.project_keys)
            self.after(attention.to_v, hooks.project_values)

    def merged_sides(self, blocks: list[Any]) -> int:
        unmerges = self.matcher.weighs_keys and way_of(blocks[0].attn1) is Way.UNMERGE
        return 1 if unmerges else super().merged_sides(blocks)

    def row(self, found: Transformer) -> ReportRow:
        row = super().row(found)
        if row.note or not found.beside or not self.settings.merge_block:
            return row
        note = f"self-attention only, beside patches of others: {', '.join(found.beside)}"
        return row._replace(note=note)


def _transformers(block: Any) -> list[Any]:
    return [module for module in block.children() if hasattr(module, "transformer_blocks")]


def _has(block: Any, kind: str) -> bool:
    return any(type(module).__name__ == kind for module in block.modules())


def _patches_of_others(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The patches that other extensions have for the block that these transformer_options are for.

    They are of ComfyUI's form: lists by name, and replacements by block.
    """
    patches = options.get("patches", {})
    found = [name for name in _PATCHES if name in patches]
    block = options.get("block")
    if block is not None:
        blocks = block, (block[0], block[1], options.get("block_index", 0))
        for name, replaced in options.get("patches_replace", {}).items():
            if not {*blocks}.isdisjoint(replaced):
                found.append(name)
    return tuple(found)
