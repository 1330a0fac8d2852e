"""Stand-ins for ComfyUI's transformers: tiny, with the calling conventions that merging meets.

Blocks are called by the names of ComfyUI's arguments, through `patches_replace["dit"]` where a node
is there; some add in place; attention asks `transformer_options` for a replacement; releases differ
in the dimension of the tokens in position tables; reference images follow the image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import stand_in_comfyui

WIDTH, HEADS = 16, 2
_PACKAGE = "comfy.ldm.stand_in"


def optimized_attention(q, k, v, heads, mask=None, transformer_options={}):  # noqa: B006
    """Of [B, N, heads·d] or [B, heads, N, d]."""
    override = transformer_options.get("optimized_attention_override")
    kernel = stand_in_comfyui.optimized_attention_masked
    function = _of_heads(kernel)
    if override is not None:
        return override(
            function, q, k, v, heads, mask=mask, transformer_options=transformer_options
        )
    return function(q, k, v, heads, mask=mask)


def _of_heads(kernel):
    def function(q, k, v, heads, mask=None, **options):
        q, k, v = (x.transpose(1, 2).flatten(2) if x.dim() == 4 else x for x in (q, k, v))
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        return kernel(q, k, v, heads, mask)

    function.__name__ = kernel.__name__
    return function


def turned(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys with rotary positions, in pairs of features."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2)


def positions(grids, batch: int, text: int = 0) -> Tensor:
    """[batch, 1, tokens, d/2, 2, 2] of text and images, each of (frames, height, width)."""
    places = [torch.zeros(text, 3)]
    for i, (frames, h, w) in enumerate(grids):
        axes = torch.arange(frames) + i, torch.arange(h), torch.arange(w)
        places.append(torch.cartesian_prod(*axes).view(-1, 3).float())
    angles = torch.cat(places) @ torch.tensor([[1.0, 0, 0, 0.1], [0, 0.7, 0, 0.2], [0, 0, 0.5, 0]])
    c, s = angles.cos(), angles.sin()
    table = torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))
    return table.expand(batch, 1, *table.shape)


def patches(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Latents as tokens, padded to patches of 2×2, and their grid."""
    x = x[:, :, None] if x.dim() == 4 else x
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2, 0, 0), mode="replicate")
    grid = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
    return x.flatten(4).flatten(1, 3), grid


def latents(tokens: Tensor, grid, like: Tensor) -> Tensor:
    x = tokens.unflatten(1, grid).unflatten(-1, (-1, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6)
    x = x.flatten(5).flatten(3, 4)[..., : like.shape[-2], : like.shape[-1]]
    return x[:, :, 0] if like.dim() == 4 else x


class _Stream(nn.Module):
    """What a block has for one stream of tokens."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def heads(self, x: Tensor, vec: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, heads, N, d]."""
        qkv = self.qkv(self.norm1(x) * (1 + vec)).unflatten(2, (3, HEADS, -1))
        return list(qkv.permute(2, 0, 3, 1, 4))

    def added(self, x: Tensor, attended: Tensor, vec: Tensor) -> Tensor:
        x = x + vec * self.proj(attended)
        return x + self.mlp(self.norm2(x))


def _joint(txt, img, c, i, table, mask, options):
    """Attention of text and image together: what each of them gets."""
    q, k, v = (torch.cat(each, 2) for each in zip(txt.heads(*c), img.heads(*i), strict=True))
    if table is not None:
        q, k = turned(q, table), turned(k, table)
    out = optimized_attention(q, k, v, HEADS, mask=mask, transformer_options=options)
    return out.split([c[0].shape[1], i[0].shape[1]], dim=1)


class DoubleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.img, self.txt = _Stream(), _Stream()

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options={}):  # noqa: B006
        streams = self.txt, self.img, (txt, vec), (img, vec)
        for_txt, for_img = _joint(*streams, pe, attn_mask, transformer_options)
        img += self.img.added(img, for_img, vec) - img
        txt += self.txt.added(txt, for_txt, vec) - txt
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stream = _Stream()

    def forward(self, x, vec, pe, attn_mask=None, transformer_options={}):  # noqa: B006
        q, k, v = self.stream.heads(x, vec)
        q, k = turned(q, pe), turned(k, pe)
        options = transformer_options
        out = optimized_attention(q, k, v, HEADS, mask=attn_mask, transformer_options=options)
        x += self.stream.added(x, out, vec) - x
        return x


class JointBlock(nn.Module):
    """SD3's, with a second attention of the image alone."""

    def __init__(self):
        super().__init__()
        self.img, self.txt = _Stream(), _Stream()

    def forward(self, *args, **kwargs):
        return self._mixed(*args, **kwargs)

    def _mixed(self, context, x, c, transformer_options={}):  # noqa: B006
        streams = self.txt, self.img, (context, c), (x, c)
        for_txt, for_img = _joint(*streams, None, None, transformer_options)
        alone = optimized_attention(
            *self.img.heads(x, c), HEADS, transformer_options=transformer_options
        )
        return self.txt.added(context, for_txt, c), self.img.added(x, for_img + alone, c)


class QwenImageTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.img, self.txt = _Stream(), _Stream()

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb=None,
        timestep_zero_index=None,
        transformer_options={},  # noqa: B006
    ):
        img, txt, vec = hidden_states, encoder_hidden_states, temb
        if timestep_zero_index is not None:
            after = img.shape[1] - timestep_zero_index
            vec = torch.cat(
                [vec.expand(-1, timestep_zero_index, -1), 0 * vec.expand(-1, after, -1)], 1
            )
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = F.pad(mask, (0, img.shape[1]))[:, None]
        table = image_rotary_emb.transpose(1, 2)
        streams = self.txt, self.img, (txt, temb), (img, vec)
        for_txt, for_img = _joint(*streams, table, mask, transformer_options)
        return self.txt.added(txt, for_txt, temb), self.img.added(img, for_img, vec)


class WanSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, freqs, transformer_options={}):  # noqa: B006
        q, k = (turned(p(x).unflatten(2, (HEADS, -1)), freqs).flatten(2) for p in (self.q, self.k))
        options = transformer_options
        return optimized_attention(q, k, self.v(x), HEADS, transformer_options=options)


class WanCrossAttention(WanSelfAttention):
    def forward(self, x, context, transformer_options={}):  # noqa: B006
        q, k, v = self.q(x), self.k(context), self.v(context)
        return optimized_attention(q, k, v, HEADS, transformer_options=transformer_options)


class WanAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = WanSelfAttention(), WanCrossAttention()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, e, freqs, context, transformer_options={}):  # noqa: B006
        """e: [B, 1, C], or [B, frames, 1, C] with a timestep for each frame."""
        if e.dim() == 4:
            e = e[:, :, 0].repeat_interleave(x.shape[1] // e.shape[1], 1)
        options = transformer_options
        x = x + e * self.self_attn(self.norm(x) * (1 + e), freqs, transformer_options=options)
        return x + self.cross_attn(x, context, transformer_options=options)


class _Transformer(nn.Module):
    """How all of them call their blocks."""

    kinds: tuple[type[nn.Module], ...]
    lists: tuple[str, ...]
    patch_size = 2

    def __init_subclass__(cls):
        cls.__module__ = _PACKAGE

    def __init__(self):
        super().__init__()
        for name, kind in zip(self.lists, self.kinds, strict=True):
            self.add_module(name, nn.ModuleList(kind() for _ in range(2)))
        self.img_in, self.time_in = nn.Linear(16, WIDTH), nn.Linear(1, WIDTH)
        self.out = nn.Linear(WIDTH, 16)

    def start(self, x, timestep, refs=()):
        """Tokens of all images, their grids, and what modulates them: [B, 1, C]."""
        tokens, grids = zip(*map(patches, (x, *refs)), strict=True)
        return self.img_in(torch.cat(tokens, 1)), grids, self._vec(timestep)

    def _vec(self, timestep):
        return self.time_in(timestep[..., None] / 1000).view(len(timestep), -1, WIDTH)

    def end(self, tokens, grid, like):
        return latents(self.out(tokens), grid, like)

    def blocks_of(self, name, kind, options, call):
        """Let `call(block, args)` run each block, or a node in its place."""
        replaced = options.get("patches_replace", {}).get("dit", {})

        def run(block, index, args):
            args = args | {"transformer_options": options}
            node = replaced.get((kind, index))
            if node is None:
                return call(block, args)
            return node(args, {"original_block": lambda given: call(block, given)})

        return [
            lambda args, block=block, index=index: run(block, index, args)
            for index, block in enumerate(getattr(self, name))
        ]


class Flux(_Transformer):
    kinds, lists = (DoubleStreamBlock, SingleStreamBlock), ("double_blocks", "single_blocks")

    def forward(
        self,
        x,
        timestep,
        context,
        ref_latents=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        img, grids, vec = self.start(x, timestep, ref_latents or ())
        txt, options = context.clone(), transformer_options
        pe = positions(grids, len(x), txt.shape[1]).to(x.dtype)
        beside = {"vec": vec, "pe": pe, "attn_mask": kwargs.get("attention_mask")}

        def double(block, args):
            return dict(zip(("img", "txt"), block(**args), strict=True))

        for run in self.blocks_of("double_blocks", "double_block", options, double):
            out = run({"img": img, "txt": txt, **beside})
            img, txt = out["img"], out["txt"]
        img = torch.cat([txt, img], 1)

        def single(block, args):
            args = dict(args)
            return {"img": block(args.pop("img"), **args)}

        for run in self.blocks_of("single_blocks", "single_block", options, single):
            img = run({"img": img, **beside})["img"]
        n = grids[0][1] * grids[0][2]
        return self.end(img[:, txt.shape[1] :][:, :n], grids[0], x)


class OpenAISignatureMMDITWrapper(_Transformer):
    kinds, lists = (JointBlock,), ("joint_blocks",)

    def forward(self, x, timesteps, context=None, transformer_options={}, **kwargs):  # noqa: B006
        img, grids, vec = self.start(x, timesteps)
        txt = context

        def joint(block, args):
            args = dict(args)
            return block(args.pop("txt"), args.pop("img"), c=args.pop("vec"), **args)

        for run in self.blocks_of("joint_blocks", "double_block", transformer_options, joint):
            txt, img = run({"img": img, "txt": txt, "vec": vec})
        return self.end(img, grids[0], x)


class QwenImageTransformer2DModel(_Transformer):
    kinds, lists = (QwenImageTransformerBlock,), ("transformer_blocks",)

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        ref_latents=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        img, grids, temb = self.start(x, timestep, ref_latents or ())
        txt, mask = context, attention_mask
        mask = None if mask is None else (mask - 1) * torch.finfo(x.dtype).max
        n = grids[0][0] * grids[0][1] * grids[0][2]
        given = {
            "encoder_hidden_states_mask": mask,
            "temb": temb,
            "image_rotary_emb": positions(grids, len(x), txt.shape[1]).transpose(1, 2).to(x.dtype),
            "timestep_zero_index": n if ref_latents else None,
        }

        def call(block, args):
            return block(
                hidden_states=args["img"],
                encoder_hidden_states=args["txt"],
                transformer_options=args["transformer_options"],
                **given,
            )

        for run in self.blocks_of("transformer_blocks", "double_block", transformer_options, call):
            txt, img = run({"img": img, "txt": txt})
        return self.end(img[:, :n], grids[0], x)


class WanModel(_Transformer):
    kinds, lists = (WanAttentionBlock,), ("blocks",)
    patch_size = (1, 2, 2)
    ref_conv = None

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        img, grids, vec = self.start(x, timestep)
        vec = vec[:, :, None] if timestep.dim() == 2 else vec
        freqs = positions(grids, 1).movedim(1, 2).to(x.dtype)

        def call(block, args):
            args = dict(args)
            return block(args.pop("img"), **args)

        for run in self.blocks_of("blocks", "double_block", transformer_options, call):
            img = run({"img": img, "e": vec, "freqs": freqs, "context": context})
        return self.end(img, grids[0], x)


class HumoWanModel(WanModel):
    pass


class WanModelOfTomorrow(WanModel):
    pass


TRANSFORMERS = {
    "Flux": Flux,
    "SD3": OpenAISignatureMMDITWrapper,
    "Qwen-Image": QwenImageTransformer2DModel,
    "Wan": WanModel,
}


def build(kind: type[_Transformer], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()
