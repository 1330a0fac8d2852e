"""Vision Transformers of transformers, timm and torchvision."""

from tomesd.vit import hosts
from tomesd.vit.layer import HookPoints, Layer
from tomesd.vit.patch import ViTPatch
from tomesd.vit.rotary import Rotary
from tomesd.vit.spec import Places, ViT

__all__ = ["HookPoints", "Layer", "Places", "Rotary", "ViT", "ViTPatch", "hosts"]
