"""Kernels on the CPU, in Triton's interpreter, beside what they replace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    TensorHandle,
    _convert_float,
)

from tomesd import TokenMap, kernels


@contextmanager
def with_kernels() -> Iterator[None]:
    """Kernels run on tensors of the CPU, as the interpreter lets them."""
    with (
        patch.object(kernels, "available", lambda device: True),
        patch.object(InterpreterBuilder, "create_dot", _dot),
        patch.object(interpreter, "_patch_lang_tensor", _patch_numbers),
    ):
        yield


_patch_tensors = interpreter._patch_lang_tensor


def _patch_numbers(tensor, *scope):
    """In Triton 3.5, a loop's bounds are arrays of one number, of which NumPy 2.4 makes no int."""
    _patch_tensors(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


_interpreted_dot = InterpreterBuilder.create_dot


def _dot(self, a, b, *others):
    """The interpreter multiplies the bits of bfloat16 as if they were whole numbers."""

    def wide(x):
        if x.dtype.scalar is not tl.bfloat16:
            return x
        values = _convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return TensorHandle(values, tl.float32)

    return _interpreted_dot(self, wide(a), wide(b), *others)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What PyTorch gives, and what kernels give."""
    expected = run()
    with with_kernels(), count_launches() as launches:
        got = run()
    assert launches.kernels, "no kernel ran"
    return expected, got


class Launches(TorchDispatchMode):
    """What a GPU would be given to do: kernels, and PyTorch's operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        allocates = name.startswith(("aten.empty", "aten.new_empty"))
        if isinstance(result, Tensor | tuple) and not function.is_view and not allocates:
            self.operators.append(name)
        return result


@contextmanager
def count_launches() -> Iterator[Launches]:
    launches = Launches()
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.kernels.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", counted), launches:
        yield launches


def assert_a_map(token_map: TokenMap, n: int) -> None:
    """Every token is a head or merged into one, and the rows agree with one another."""
    head, moved, group = token_map.head, token_map.moved, token_map.group
    for sample in range(len(head)):
        assert sorted([*head[sample].tolist(), *moved[sample].tolist()]) == list(range(n))
        assert head[sample].tolist() == sorted(head[sample].tolist())
        assert group[sample][head[sample]].tolist() == list(range(token_map.m))
        counts = torch.bincount(group[sample], minlength=token_map.m)
        assert token_map.size[sample, :, 0].tolist() == counts.tolist()
        into = group[sample][moved[sample]].tolist()
        assert into == sorted(into)
        begins = token_map.first[sample] - sample * moved.shape[1]
        assert begins.tolist() == [sum(each < g for each in into) for g in range(token_map.m)]


def assert_same_map(expected: TokenMap, got: TokenMap) -> None:
    for name in ("group", "head", "size"):
        assert torch.equal(getattr(expected, name), getattr(got, name)), name
    assert torch.equal(expected.moved.sort(1).values, got.moved.sort(1).values)
