"""A Vision Transformer that merges 16 tokens in each layer: python examples/vit.py [folder]

timm's ViT-B/16, or a folder with a transformers classifier, such as assets/classifier. Times the
model on 8 images of noise, which take as long as any others.
"""

import sys

import torch
from torch.utils.benchmark import Timer

import tomesd

torch.set_grad_enabled(False)
if len(sys.argv) > 1:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
    side = model.config.image_size
else:
    import timm

    model = timm.create_model("vit_base_patch16_224.augreg_in21k_ft_in1k", pretrained=True).eval()
    side = 224

timer = Timer("model(images)", globals={"model": model, "images": torch.randn(8, 3, side, side)})
unpatched = timer.timeit(3).mean
tomesd.apply_patch(model, r=16)
print(f"unpatched {unpatched:.3f} s, with r = 16 {timer.timeit(3).mean:.3f} s")
print(tomesd.report(model))
