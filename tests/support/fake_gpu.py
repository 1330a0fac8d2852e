"""A GPU for machines without one: tensors that say they are there, and have no values.

Whatever reads a value, which would be a sync on a GPU, raises; so does whatever
puts a tensor of the CPU together with one of the GPU.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def can_be_faked() -> bool:
    """Whether this torch wants no driver for it: 2.14 does not, 2.9 does."""
    try:
        with FakeTensorMode() as mode:
            mode.from_tensor(torch.ones(1)).to("cuda").neg()
    except RuntimeError:
        return False
    return True


# Device, precision and shape of each.
Outputs = list[tuple[str, torch.dtype, torch.Size]]


@torch.no_grad()  # Autograd wants the real thing.
def run_on_gpu(model: nn.Module, inputs: dict, dtype: torch.dtype) -> Outputs:
    """Device, precision and shape of all that the model gives. The model itself stays as it is."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def moved(part: Any) -> Any:
            if isinstance(part, Tensor):
                part = mode.from_tensor(part).to("cuda")
                return part.to(dtype) if part.is_floating_point() else part
            if isinstance(part, dict):
                return {name: moved(each) for name, each in part.items()}
            return type(part)(map(moved, part)) if isinstance(part, list | tuple) else part

        state = dict(chain(model.named_parameters(), model.named_buffers()))
        output = torch.func.functional_call(model, moved(state), (), moved(inputs))
        return [(each.device.type, each.dtype, each.shape) for each in _tensors(output)]


def _tensors(output: Any) -> chain[Tensor] | list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return chain.from_iterable(map(_tensors, (part for part in parts if part is not None)))
