"""Stable Diffusion 1.5 with half of its tokens merged: python examples/sd15.py [folder or hub id]

All levels merge, but not in the first fifth of the steps, which determine the layout: as fast as
the default, and closer to the unpatched image (docs/results.md). Writes sd15.png.
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

import tomesd

model = sys.argv[1] if len(sys.argv) > 1 else "stable-diffusion-v1-5/stable-diffusion-v1-5"
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)

tomesd.apply_patch(pipe, ratio=tomesd.RatioSchedule.last(0.5, since=0.2), max_downsample=8)
pipe("a photo of a red heart on a blue striped background").images[0].save("sd15.png")
print(tomesd.report(pipe))
