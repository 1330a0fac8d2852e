"""What all speed measurements share: the model, sizes, variants, device, and the peer."""

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.memory import first_line, ran_out
from benchmarks.models.unets import Denoiser
from benchmarks.peer.process import Peer, PeerError
from benchmarks.speed.variants import Variant
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.pictures.device import PRECISIONS, cpu_name
from tomesd.pictures.files import versions


@dataclass(frozen=True)
class Setup:
    """What all measurements share, checked.

    compiled: torch.compile's mode; None runs eagerly. peer: the folder of the peer's package.
    """

    denoiser: Denoiser
    sizes: list[int]
    variants: list[Variant]
    batch: int
    rounds: int
    device: torch.device
    precision: str
    compiled: str | None
    measures_memory: bool
    peer: Path | None
    peer_name: str

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def warm_ups(self) -> int:
        """Untimed forwards. "reduce-overhead" runs once as usual and once more to record its CUDA
        graphs."""
        return 3 if self.compiled and self.device.type == "cuda" else 1

    def latents(self, size: int) -> int:
        """The side of a picture in latents, or in a transformer's tokens."""
        return size // self.denoiser.pixels

    def inputs(self, size: int) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one forward."""
        return self.denoiser.inputs(self.batch, self.latents(size), self.device, self.dtype)

    def peer_settings(self, settings: DiffusionSettings) -> dict[str, Any]:
        """The arguments of the peer's `apply_patch`. It counts levels from the latents, not from
        the finest one with attention: on SDXL its max_downsample=1 would do nothing."""
        names = ("ratio", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
        known = {name: getattr(settings, name) for name in names}
        if settings.merge_block:  # The same branches, which the peer has one by one only.
            known |= dict.fromkeys(("merge_attn", "merge_crossattn", "merge_mlp"), True)
        return known | {"max_downsample": settings.max_downsample * self.finest_level}

    @cached_property
    def finest_level(self) -> int:
        """How much coarser than the latents the finest level with attention is."""
        size = self.latents(self.sizes[0])
        return -(-size // self.denoiser.levels(size)[0].h)

    def start_peer(self, stack: ExitStack) -> Peer | None:
        """The peer with the model's weights loaded; None without --peer."""
        if self.peer is None:
            return None
        peer = stack.enter_context(Peer(self.peer))
        dtype = str(self.dtype).removeprefix("torch.")
        peer.ask("load", config=self.denoiser.config, device=str(self.device), dtype=dtype)
        return peer

    def patch_peer(self, peer: Peer, variant: Variant) -> dict[str, Any]:
        """Let the peer patch a model for this variant; returns its settings."""
        assert variant.settings is not None
        settings = self.peer_settings(variant.settings)
        peer.ask("patch", variant=variant.name, settings=settings, compiled=self.compiled)
        return settings


def new_row(variant: Variant, size: int) -> dict[str, Any]:
    """A variant's row of the results before anything is measured."""
    return {
        "size": size,
        "variant": variant.name,
        "kind": variant.kind,
        "patch": asdict(variant.settings) if variant.settings else None,
        "memory": None,
    }


@contextmanager
def record_failure(row: dict[str, Any]) -> Iterator[None]:
    """Record in the row that memory ran out or the peer failed, so that the others are measured.

    >>> row = {}
    >>> with record_failure(row):
    ...     raise MemoryError("forward_peak was killed in its process (exit code -9)")
    >>> row["error"]
    'forward_peak was killed in its process (exit code -9)'
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, PeerError) or ran_out(error)):
            raise
        row["error"] = first_line(error)


def environment(setup: Setup) -> dict[str, Any]:
    """The machine, versions and settings that times depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(setup.device),
        "accelerator": torch.cuda.get_device_name(setup.device)
        if setup.device.type == "cuda"
        else None,
        "precision": setup.precision,
        "batch": setup.batch,
        "rounds": setup.rounds,
        "compiled": setup.compiled,
        **versions("tomesd", "torch", "diffusers"),
        "peer": setup.peer_name or None,
    }
