"""What is known of a GPU without asking it again, and whether a graph is made for elsewhere."""

from functools import cache

import torch


def runs_kernels(index: int) -> bool:
    """Whether the GPU with this index is NVIDIA's and of compute capability 8.0 or above."""
    return torch.version.hip is None and _described(index)[1] >= (8, 0)


def gpu_name(index: int) -> str:
    """The name of the GPU with this index."""
    return _described(index)[0]


def is_exporting() -> bool:
    """Whether torch.export makes the graph, and not torch.compile.

    This is the flag of torch.compiler.is_exporting, which itself is True in all that torch.compile
    compiles in releases before the fix of https://github.com/pytorch/pytorch/issues/176347.
    """
    return torch.compiler._is_exporting_flag


@cache
def _described(index: int) -> tuple[str, tuple[int, int]]:
    if not torch.cuda.is_available():  # Fake tensors may be on a GPU that is not there.
        return "", (0, 0)
    found = torch.cuda.get_device_properties(index)
    return found.name, (found.major, found.minor)


# While compiling they are called, not traced, as torch.compiler.assume_constant_result does it,
# which would import the compiler.
for _function in (runs_kernels, gpu_name):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010
