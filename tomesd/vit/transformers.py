"""Token merging in transformers' Vision Transformers; see `tomesd.vit.patch` for the hooks.

Images: ViT, DeiT, ViTMAE (its encoder), DINOv2 with and without registers, the vision towers of
CLIP and SigLIP. Audio: the Audio Spectrogram Transformer. Heads, decoders, feature maps and
`output_hidden_states` get all tokens, unless unmerge=False; `output_attentions` gives the attention
that was computed, which is between merged tokens.
"""

from typing import Any

from torch import Tensor, nn

from tomesd.vit.patch import Layer, Seams, ViTPatch
from tomesd.vit.settings import ViTSettings

MODELS = (
    "ViTModel",
    "DeiTModel",
    "ViTMAEModel",
    "Dinov2Model",
    "Dinov2Backbone",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersBackbone",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "ASTModel",
)
REFUSED = {
    "SwinModel": "its attention is in windows of the token grid, in every layer",
    "SwinBackbone": "its attention is in windows of the token grid, in every layer",
    "Swinv2Model": "its attention is in windows of the token grid, in every layer",
    "Swinv2Backbone": "its attention is in windows of the token grid, in every layer",
    "BeitModel": "its attention adds a bias by token positions in every layer",
    "BeitBackbone": "its attention adds a bias by token positions in every layer",
    "Data2VecVisionModel": "its attention adds a bias by token positions in every layer",
    "DINOv3ViTModel": "its attention rotates queries and keys by token positions in every layer",
    "DINOv3ViTBackbone": "its attention rotates queries and keys by token positions in every layer",
    "VJEPA2Model": "its attention rotates queries and keys by token positions in every layer",
}

# A block's module that gets its input, its attention, the first module after attention, and the
# last one before its output joins the residual stream.
_PLACES = {
    "ViTLayer": ("layernorm_before", "attention", "layernorm_after", "mlp"),
    "DeiTLayer": ("layernorm_before", "attention", "layernorm_after", "mlp"),
    "ViTMAELayer": ("layernorm_before", "attention", "layernorm_after", "mlp"),
    "ASTLayer": ("layernorm_before", "attention", "layernorm_after", "mlp"),
    "Dinov2Layer": ("norm1", "attention", "norm2", "layer_scale2"),
    "Dinov2WithRegistersLayer": ("norm1", "attention", "norm2", "layer_scale2"),
    "CLIPEncoderLayer": ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "SiglipEncoderLayer": ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
}

# These take a bias on the keys; the kernels of flash attention do not.
_TAKE_A_BIAS = ("eager", "sdpa")


class _Layer(Layer):
    def by_heads(self, name: str, output: Tensor) -> Tensor:
        return output.unflatten(-1, (-1, self.attention.head_dim))

    def weigh_keys(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple:
        x = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        bias = self.run.key_bias(self.index, x, mask)
        return args[:1], kwargs | {"attention_mask": None if bias is None else bias[:, None, None]}


class TransformersViTPatch(ViTPatch):
    layer_type: type[Layer] = _Layer

    def __init__(self, model: Any, settings: ViTSettings):
        attention = model.config._attn_implementation
        if settings.prop_attn and attention not in _TAKE_A_BIAS:
            raise ValueError(
                f"prop_attn must be False with attn_implementation={attention!r}, which takes no "
                f"bias on its keys; or set_attn_implementation to {' or '.join(_TAKE_A_BIAS)}"
            )
        name = type(model).__name__
        if not settings.unmerge and name.endswith("Backbone"):
            raise ValueError(
                f"unmerge must be True with {name}, whose feature maps have a place for every "
                "token, got False"
            )
        super().__init__(model, settings)

    def find_seams(self) -> list[Seams]:
        return [self.block_seams(block) for block in _blocks(self.model)]

    def block_seams(self, block: Any) -> Seams:
        enter, attention, merge, unmerge = (
            getattr(block, name) for name in _PLACES[type(block).__name__]
        )
        features = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        width = attention.q_proj.out_features
        return Seams(block, enter, attention, merge, unmerge, features, width)

    def count_prefix(self) -> int:
        embeddings = self.model.embeddings
        single = ("cls_token", "class_embedding", "distillation_token")
        registers = getattr(embeddings, "register_tokens", None)
        return sum(hasattr(embeddings, name) for name in single) + (
            0 if registers is None else registers.shape[1]
        )

    def count_tokens(self) -> int:
        embeddings = self.model.embeddings
        if type(embeddings).__name__ == "ASTEmbeddings":
            return embeddings.position_embeddings.shape[1]
        counted = embeddings if hasattr(embeddings, "num_patches") else embeddings.patch_embeddings
        # A masked autoencoder encodes only the patches that it sees.
        seen = 1 - getattr(self.model.config, "mask_ratio", 0)
        return int(counted.num_patches * seen) + self.prefix

    def install(self) -> None:
        super().install()
        if any(self.run.schedule) and self.settings.unmerge:
            # DINOv2 collects hidden states in its encoder.
            is_dino = type(self.model).__name__.startswith("Dinov2")
            recorder = self.model.encoder if is_dino else self.model
            self.leave(recorder, self.unmerge_hidden_states)

    def unmerge_hidden_states(self, recorder: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(
                self._all_tokens(part) if isinstance(part, tuple) else part for part in output
            )
        if output.hidden_states is not None:
            output["hidden_states"] = self._all_tokens(output.hidden_states)
        return output

    def _all_tokens(self, states: tuple) -> tuple:
        """states: what goes into each block, and the last one's output, which is unmerged already;
        None where the caller wants only some. Anything else (attentions) stays as it is."""
        if len(states) != len(self.run.maps):
            return states
        into = zip(self.run.maps[:-1], states[:-1], strict=True)
        return (*(None if x is None else so_far.unmerge(x) for so_far, x in into), states[-1])


def _blocks(model: Any) -> nn.ModuleList:
    if hasattr(model, "layers"):
        return model.layers
    return model.encoder.layers if hasattr(model.encoder, "layers") else model.encoder.layer
