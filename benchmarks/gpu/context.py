"""What all parts of the GPU suite share: the device, and how much of everything."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tomesd
from benchmarks.common.device import PRECISIONS, device_name
from benchmarks.common.files import versions
from benchmarks.models import transformers, unets
from benchmarks.models.unets import Denoiser
from tomesd import kernels

Row = dict[str, Any]

PEER = "tomesd==0.1.3"

# As SD1.5's, with two levels and few channels.
TINY_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Context:
    """Where and how the parts measure.

    quick: tiny models and few rounds, to try that every line runs. peers: the folders of other
    implementations by the name of their package, "tomesd" and "tome".
    """

    device: torch.device
    quick: bool
    peers: dict[str, Path]

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        return "fp16" if self.is_gpu else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 10

    def denoiser(self, model: str) -> Denoiser:
        """sd15, sdxl, sd3 or flux; a tiny UNet in their place in a quick run."""
        if self.quick:
            return Denoiser(f"tiny for {model}", TINY_UNET, pixels=8, size=128)
        return transformers.denoiser(model)

    def build(self, model: str, dtype: torch.dtype | None = None) -> tuple[Any, Denoiser]:
        denoiser = self.denoiser(model)
        return denoiser.build(self.device, dtype or self.dtype), denoiser

    def inputs(self, denoiser: Denoiser, size: int, dtype: torch.dtype | None = None) -> Any:
        """Arguments of one forward for a picture of this size, or of 128 px in a quick run."""
        pixels = 128 if self.quick else size
        side = pixels // denoiser.pixels
        return denoiser.inputs(denoiser.batch, side, self.device, dtype or self.dtype)

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return unets.noise(shape, self.device, dtype or self.dtype)

    def free(self) -> None:
        """Give memory back between cases."""
        torch.compiler.reset()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def environment(self) -> Row:
        about: Row = {
            "device": device_name(self.device),
            "type": self.device.type,
            "precision": self.precision,
            "quick": self.quick,
            "threads": torch.get_num_threads(),
            "kernels": kernels.available(self.device),
            **versions("tomesd", "torch", "triton", "diffusers", "timm"),
        }
        if self.is_gpu:
            found = torch.cuda.get_device_properties(self.device)
            about |= {
                "capability": f"{found.major}.{found.minor}",
                "memory": found.total_memory,
                "multiprocessors": found.multi_processor_count,
                "cuda": torch.version.cuda,
            }
        return about


class Case(NamedTuple):
    """One measurement of a part.

    seconds: about how long it takes on a GPU; it does not start if less time is left.
    """

    name: str
    run: Callable[[], Row]
    seconds: float = 10


class Part(NamedTuple):
    """cases: in the order of their worth."""

    name: str
    cases: Callable[[Context], Sequence[Case]]


@contextmanager
def with_kernels(enabled: bool) -> Iterator[None]:
    """Kernels or PyTorch, whatever the process uses otherwise."""
    before = kernels.enabled()
    tomesd.use_kernels(enabled)
    try:
        yield
    finally:
        tomesd.use_kernels(before)
