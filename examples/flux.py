"""Flux with half of its image tokens merged: python examples/flux.py [folder or hub id]

Every block of a diffusion transformer merges its image tokens; text tokens never merge. Writes
flux.png.
"""

import sys

import torch
from diffusers import FluxPipeline

import tomesd

model = sys.argv[1] if len(sys.argv) > 1 else "black-forest-labs/FLUX.1-dev"
pipe = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()

tomesd.apply_patch(pipe, ratio=0.5)
pipe("a photo of a red heart on a blue striped background").images[0].save("flux.png")
print(tomesd.report(pipe))
