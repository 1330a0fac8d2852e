"""The hosts whose Vision Transformers merge; importing a module registers its classes."""

from tomesd.vit.hosts import timm, torchvision, towers, transformers, videomae

__all__ = ["timm", "torchvision", "towers", "transformers", "videomae"]
