"""UNets and ControlNets of diffusers."""

from tomesd.diffusion.unet.patch import UNetPatch
from tomesd.diffusion.unet.spec import UNet
from tomesd.registry import refuse, register

__all__ = ["UNet", "UNetPatch"]

register(
    UNet(),
    "diffusers.UNet2DConditionModel",
    "diffusers.UNetMotionModel",
    "diffusers.UNetSpatioTemporalConditionModel",
    "diffusers.UNet3DConditionModel",
    "diffusers.I2VGenXLUNet",
    "diffusers.ControlNetModel",
    "diffusers.ControlNetUnionModel",
    "diffusers.SparseControlNetModel",
)

refuse(
    "it has no spatial transformers, whose blocks could merge",
    "diffusers.Kandinsky3UNet",
    "diffusers.StableCascadeUNet",
    "diffusers.UNet2DModel",
)
refuse(
    "at all levels but the coarsest, its blocks have no self-attention and are no residual of "
    "their input",
    "diffusers.DreamLiteUNetModel",
)
refuse("its tokens are samples of a signal, not of a grid", "diffusers.UNet1DModel")
refuse(
    "its transformers come in pairs, which are not supported yet",
    "diffusers.UNetControlNetXSModel",
)
refuse(
    "it is part of a UNetControlNetXSModel, which does not merge", "diffusers.ControlNetXSAdapter"
)
refuse(
    "it is part of a UNetMotionModel: apply_patch that model or its pipeline",
    "diffusers.MotionAdapter",
)
refuse(
    "its transformers are in blocks of another layout, which is not supported yet",
    "diffusers.UVit2DModel",
)
