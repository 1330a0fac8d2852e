"""Which device and which precision a command computes with, and what the device is called."""

import platform
from pathlib import Path

import torch

from tomesd.pictures import names
from tomesd.pictures.names import DEVICES

PRECISIONS: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in names.PRECISIONS.items()
}


def choose_device(name: str | None = None) -> torch.device:
    """The device with this name, or the best available one: cuda, else mps, else cpu.

    >>> choose_device("cpu")
    device(type='cpu')

    name: also with an index, such as "cuda:1".
    Raises ValueError for a device that is unknown or not available.
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and found.type in DEVICES else torch.device("cpu")
    if name.partition(":")[0] not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be available, got {name!r}: {reason}") from error
    return device


def choose_precision(device: torch.device) -> str:
    """The fastest precision in which Stable Diffusion is safe on a device.

    >>> choose_precision(torch.device("cpu"))
    'fp32'

    On CUDA bf16 where the hardware has it, else fp16. fp32 elsewhere: CPUs compute half precision
    more slowly, and on mps some autoencoders overflow in it.
    """
    if device.type != "cuda":
        return "fp32"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU.

    >>> device_name(torch.device("cpu")) == cpu_name()
    True
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, or Python where there is no such file.

    >>> isinstance(cpu_name(), str)
    True
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
