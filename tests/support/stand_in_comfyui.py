"""A stand-in for ComfyUI and Forge: a tiny UNet and a ModelPatcher with their calling conventions.

Blocks add in place and hand `transformer_options` along, with patches of others for single blocks;
clones of a ModelPatcher share one model and keep their options apart; ComfyUI calls wrappers around
`apply_model`, Forge one `model_function_wrapper`. Only what token merging meets is here.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.tiny_model import WIDTH

HEADS = 2


def attention_pytorch(q, k, v, heads, mask=None, **options):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def attention_sub_quad(q, k, v, heads, mask=None, **options):
    """As a kernel that takes no mask with one row."""
    assert mask is None
    return attention_pytorch(q, k, v, heads)


optimized_attention_masked = attention_pytorch


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
        context = x if context is None else context
        k, v = self.to_k(context), self.to_v(context if value is None else value)
        attend = optimized_attention_masked
        override = transformer_options.get("optimized_attention_override")
        if override is not None:
            return self.to_out(override(attend, self.to_q(x), k, v, self.heads, mask=mask))
        return self.to_out(attend(self.to_q(x), k, v, self.heads, mask=mask))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.disable_self_attn = False
        self.attn1 = CrossAttention(width, width)
        self.attn2 = CrossAttention(width, WIDTH)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        patches = transformer_options.get("patches", {})
        replaced = transformer_options.get("patches_replace", {})
        block = transformer_options.get("block")
        for attn, norm, name in (
            (self.attn1, self.norm1, "attn1"),
            (self.attn2, self.norm2, "attn2"),
        ):
            n = norm(x)
            keys = context if name == "attn2" else None
            values = None
            if f"{name}_patch" in patches:
                keys = values = n if keys is None else keys
                for patch in patches[f"{name}_patch"]:
                    n, keys, values = patch(n, keys, values, transformer_options)
            if block in replaced.get(name, {}):
                keys = n if keys is None else keys
                q, k, v = attn.to_q(n), attn.to_k(keys), attn.to_v(keys)
                n = attn.to_out(replaced[name][block](q, k, v, transformer_options))
            else:
                n = attn(n, context=keys, value=values, transformer_options=transformer_options)
            for patch in patches.get(f"{name}_output_patch", []):
                n = patch(n, transformer_options)
            x += n
        x += self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(width) for _ in range(depth))

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        h, w = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            tokens = block(tokens, context=context, transformer_options=transformer_options)
        return self.proj_out(tokens.transpose(1, 2).unflatten(2, (h, w))) + x


class ResBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv, self.skip = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(before, width, 1)
        self.emb = nn.Linear(WIDTH, width)

    def forward(self, x, emb):
        return self.skip(x) + F.silu(self.conv(x) + self.emb(emb)[:, :, None, None])


class Downsample(nn.Conv2d):
    pass


class Upsample(nn.Module):
    def forward(self, x, output_shape):
        return F.interpolate(x, size=output_shape, mode="nearest")


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x, emb, context, options, output_shape=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, options)
            else:
                x = layer(x, output_shape) if isinstance(layer, Upsample) else layer(x)
        return x


class UNetModel(nn.Module):
    """Two levels, each with a transformer on either side, and one in the middle."""

    def __init__(self, width: int = 16):
        super().__init__()
        stage = TimestepEmbedSequential
        self.time_embed = nn.Linear(1, WIDTH)
        self.input_blocks = nn.ModuleList(
            [
                stage(nn.Conv2d(4, width, 3, padding=1)),
                stage(ResBlock(width, width), SpatialTransformer(width, depth=2)),
                stage(Downsample(width, width, 3, stride=2, padding=1)),
                stage(ResBlock(width, width), SpatialTransformer(width)),
            ]
        )
        self.middle_block = stage(ResBlock(width, width), SpatialTransformer(width))
        self.output_blocks = nn.ModuleList(
            [
                stage(ResBlock(2 * width, width), SpatialTransformer(width)),
                stage(ResBlock(2 * width, width), SpatialTransformer(width), Upsample()),
                stage(ResBlock(2 * width, width), SpatialTransformer(width)),
                stage(ResBlock(2 * width, width), SpatialTransformer(width)),
            ]
        )
        self.out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, transformer_options={}):  # noqa: B006
        options, emb, skips = transformer_options, self.time_embed(timesteps[:, None] / 1000), []
        for i, block in enumerate(self.input_blocks):
            options["block"] = ("input", i)
            x = block(x, emb, context, options)
            skips.append(x)
        options["block"] = ("middle", 0)
        x = self.middle_block(x, emb, context, options)
        for i, block in enumerate(self.output_blocks):
            options["block"] = ("output", i)
            x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb, context, options, skips[-1].shape[-2:] if skips else None)
        return self.out(x)


class BaseModel(nn.Module):
    """The model that clones share."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model, self.latent_format = diffusion_model, None

    def apply_model(
        self,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options={},  # noqa: B006
    ):
        wrappers = transformer_options.get("wrappers", {}).get("apply_model", {})
        listed = [wrapper for each in wrappers.values() for wrapper in each]
        args = (x, t, c_concat, c_crossattn, control, transformer_options)
        return _Executor(self._apply_model, self, listed)(*args)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        timestep = t * 100
        noise = self.diffusion_model(
            x, timestep, context=c_crossattn, transformer_options=transformer_options
        )
        return x - t.view(-1, *(1,) * (x.dim() - 1)) * noise


class _Executor:
    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = _Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)


class ForgePatcher:
    """Forge's: one wrapper function among the options, which are copied deeply."""

    def __init__(self, model: BaseModel):
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self):
        clone = type(self)(self.model)
        clone.model_options = copy.deepcopy(self.model_options)
        return clone

    def set_model_unet_function_wrapper(self, function) -> None:
        self.model_options["model_function_wrapper"] = function

    def set_model_attn1_patch(self, patch) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches", {}).setdefault("attn1_patch", []).append(patch)

    def set_model_attn2_replace(self, patch, *block) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault("attn2", {})[block] = patch


class ModelPatcher(ForgePatcher):
    """ComfyUI's: wrappers and callbacks by kind and key."""

    def __init__(self, model: BaseModel):
        super().__init__(model)
        self.load_device = torch.device("cpu")
        self.wrappers: dict[str, dict[str, list]] = {}
        self.callbacks: dict[str, dict[str, list]] = {}

    def clone(self):
        clone = super().clone()
        for mine, theirs in ((self.wrappers, clone.wrappers), (self.callbacks, clone.callbacks)):
            for kind, by_key in mine.items():
                theirs[kind] = {key: each.copy() for key, each in by_key.items()}
        return clone

    def add_wrapper_with_key(self, kind: str, key: str, wrapper) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind: str, key: str, callback) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def cleanup(self) -> None:
        for each in self.callbacks.get("on_cleanup", {}).values():
            for callback in each:
                callback(self)


def build(
    kind: type[ForgePatcher] = ModelPatcher, seed: int = 0, model: nn.Module | None = None
) -> Any:
    """model: a UNet, if none is given."""
    torch.manual_seed(seed)
    model = UNetModel() if model is None else model
    # ComfyUI calls what is around a model by the model's name too.
    around = type(type(model).__name__, (BaseModel,), {"__module__": "comfy.model_base"})
    return kind((BaseModel if isinstance(model, UNetModel) else around)(model).eval())


@torch.no_grad()
def sample(
    patcher: Any,
    steps: int = 4,
    h: int = 10,
    w: int = 14,
    batch: int = 1,
    frames: int | None = None,
    callback: Callable | None = None,
) -> Tensor:
    """Euler's method as their samplers call the model, with guidance in one batch of two."""
    draw = torch.Generator().manual_seed(0)
    shape = (batch, 4, h, w) if frames is None else (batch, 4, frames, h, w)
    noise = torch.randn(shape, generator=draw)
    context = torch.randn(2 * batch, 5, WIDTH, generator=draw)
    sigmas = torch.linspace(10, 0, steps + 1)

    def outer_sample(x, latent_image, sampler, sigmas, denoise_mask=None, callback=None):
        try:
            return _euler(patcher, x, context, sigmas, callback)
        finally:
            if isinstance(patcher, ModelPatcher):
                patcher.cleanup()

    wrappers = getattr(patcher, "wrappers", {}).get("outer_sample", {})
    listed = [wrapper for each in wrappers.values() for wrapper in each]
    return _Executor(outer_sample, patcher, listed)(noise, None, None, sigmas, None, callback)


def _euler(patcher: Any, x: Tensor, context: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    options = copy.deepcopy(patcher.model_options)
    for step, (now, after) in enumerate(itertools.pairwise(sigmas)):
        to = options["transformer_options"] | {"sigmas": now[None]}
        if isinstance(patcher, ModelPatcher):
            to |= {"sample_sigmas": sigmas, "wrappers": patcher.wrappers}
        c = {"c_crossattn": context, "transformer_options": to}
        both, t = torch.cat([x, x]), now.repeat(2 * len(x))
        function = options.get("model_function_wrapper")
        if function is None:
            denoised = patcher.model.apply_model(both, t, **c)
        else:
            call = {"input": both, "timestep": t, "c": c, "cond_or_uncond": [0, 1]}
            denoised = function(patcher.model.apply_model, call)
        cond, uncond = denoised.chunk(2)
        denoised = uncond + 3 * (cond - uncond)
        if callback is not None:
            callback(step, denoised, x, len(sigmas) - 1)
        x = x + (after - now) * (x - denoised) / now
    return x
