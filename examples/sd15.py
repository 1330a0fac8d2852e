"""Stable Diffusion 1.5 with half of its tokens merged: python examples/sd15.py [folder or hub id]

By default nothing merges in the first fifth of the steps, which determine the layout; in the others
the finest level merges, and coarser ones where that saves time. Writes sd15.png.
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

import tomesd

model = sys.argv[1] if len(sys.argv) > 1 else "stable-diffusion-v1-5/stable-diffusion-v1-5"
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)

tomesd.apply_patch(pipe, ratio=0.5)
pipe("a photo of a red heart on a blue striped background").images[0].save("sd15.png")
print(tomesd.report(pipe))
