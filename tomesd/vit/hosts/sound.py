"""Audio encoders of transformers: Whisper, wav2vec 2.0 and its variants. AST is an image model."""

from dataclasses import replace
from typing import Any

from torch import nn

from tomesd.registry import refuse, register
from tomesd.vit.hosts.transformers import TRANSFORMERS, check_attention, places
from tomesd.vit.layer import Args, HookPoints, Kwargs, Layer
from tomesd.vit.settings import ViTSettings


def _check_whisper(model: Any, settings: ViTSettings) -> None:
    _refuse_skipping("encoder_layerdrop", model.config.encoder_layerdrop)
    check_attention(model, settings)


def _check_wav2vec2(model: Any, settings: ViTSettings) -> None:
    if model.training:
        _refuse_skipping("layerdrop", model.config.layerdrop)
    check_attention(model, settings)


def _refuse_skipping(option: str, value: float) -> None:
    if value:
        raise ValueError(
            f"{option} must be 0: a skipped layer would not merge its tokens, got {value}"
        )


_WHISPER = replace(
    TRANSFORMERS,
    places={
        "WhisperEncoderLayer": places(
            "self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"
        )
    },
    prefix=lambda model: 0,
    tokens=lambda model: model.max_source_positions,
    check=_check_whisper,
)
register(_WHISPER, "transformers.WhisperEncoder")


class _Speech(Layer):
    """A block with its norms before the branches, or with a norm after each sum of them: what goes
    into its last norm is then merged already."""

    def install_merging(self, patch: Any, points: HookPoints) -> None:
        patch.before(points.merge, self.merge)
        patch.after(points.unmerge, self.unmerge)
        block: Any = points.block
        self.norms_after = points.merge is block.feed_forward
        if self.norms_after:
            patch.before(block.final_layer_norm, self.merge_again)
        elif block.adapter_layer is not None:  # A third branch.
            patch.before(block.adapter_layer, self.merge_again)
            patch.after(block.adapter_layer, self.unmerge)
        patch.first_after(points.block, self.leave)

    def merge_again(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return (self.forward.merge(self.index, args[0]), *args[1:]), kwargs

    def leave(self, block: nn.Module, args: Args, output: Any) -> Any:
        return (
            self.finish(block, output) if self.norms_after else super().leave(block, args, output)
        )


_KIN = ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "SEW")
_BEFORE = places("layer_norm", "attention", "final_layer_norm", "feed_forward")
_AFTER = places("attention", "attention", "feed_forward", "feed_forward")


# Its tokens are those of a second of sound.
_SPEECH = replace(
    TRANSFORMERS,
    places={f"{name}EncoderLayerStableLayerNorm": _BEFORE for name in _KIN}
    | {f"{name}EncoderLayer": _AFTER for name in _KIN},
    prefix=lambda model: 0,
    tokens=lambda model: int(model._get_feat_extract_output_lengths(16000)),
    layer=_Speech,
    check=_check_wav2vec2,
)
register(_SPEECH, *(f"transformers.{name}Model" for name in _KIN))
refuse(
    "its attention adds a bias by token positions, which its tokens gate", "transformers.WavLMModel"
)
refuse(
    "its attention is in windows of the spectrogram, in every layer",
    "transformers.ClapAudioModel",
)
