"""Transformers of diffusers that do not merge, and why; variants of others are in their files."""

from tomesd.registry import refuse

refuse(
    "its attention is linear in the tokens, and its feed-forward is a convolution over their whole "
    "grid, which merged tokens do not form",
    "diffusers.SanaControlNetModel",
    "diffusers.SanaTransformer2DModel",
    "diffusers.SanaVideoTransformer3DModel",
    "diffusers.SanaWMTransformer3DModel",
)
refuse(
    "its tokens are moments of sound, not of a grid",
    "diffusers.AceStepTransformer1DModel",
    "diffusers.LongCatAudioDiTTransformer",
    "diffusers.MiniMaxMusic3RVQDepthDecoder",
    "diffusers.MiniMaxMusic3Transformer1DModel",
    "diffusers.StableAudio3DiTModel",
    "diffusers.StableAudioDiTModel",
    "diffusers.T5FilmDecoder",
)
refuse("its tokens are of a text and of one embedding, not of a grid", "diffusers.PriorTransformer")
refuse("its tokens are of a protein, not of a grid", "diffusers.RFD4ProteinaTransformer")
refuse(
    "its frames attend to earlier frames only, by masks of all tokens, which merged tokens cannot "
    "follow",
    "diffusers.AnyFlowFARTransformer3DModel",
)
refuse(
    "its images attend to earlier ones only, by masks of all tokens, which merged tokens cannot "
    "follow",
    "diffusers.QwenImage21Transformer2DModel",
)
refuse(
    "the tokens of its history are of several resolutions, not of one grid",
    "diffusers.HeliosTransformer3DModel",
)
refuse(
    "its experts choose among all tokens, and would choose others among merged ones",
    "diffusers.NucleusMoEImageTransformer2DModel",
)
refuse(
    "its blocks hand on what they make of every token, not only what they add to it",
    "diffusers.ZImageControlNetModel",
)
refuse(
    "its video, sound and text are one sequence, whose order only its data tell",
    "diffusers.MiniMaxH3Transformer3DModel",
)
refuse(
    "it is told no token grid, only positions, and its keys are kept from chunk to chunk",
    "diffusers.SanaWMLTX2RefinerTransformer3DModel",
)
