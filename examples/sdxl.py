"""SDXL with half of its tokens merged: python examples/sdxl.py [folder or hub id]

60 of its 70 blocks are at the second level with attention, which merges by default if the cost
model says that this saves time on the device. Writes sdxl.png.
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

import tomesd

model = sys.argv[1] if len(sys.argv) > 1 else "stabilityai/stable-diffusion-xl-base-1.0"
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionXLPipeline.from_pretrained(model, dtype=dtype).to(device)

tomesd.apply_patch(pipe, ratio=0.5)
pipe("a photo of a red heart on a blue striped background").images[0].save("sdxl.png")
print(tomesd.report(pipe))
