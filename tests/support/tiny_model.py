"""What every tiny diffusers model has in common: how it is built, its inputs, and its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

TEXT_TOKENS = 5
WIDTH = 16


@dataclass
class TinyModel:
    """One class of diffusers with random weights.

    name: of the class. config: its constructor's arguments. draw_inputs: (batch, h, w, normal),
    where normal(*shape) draws random numbers in the model's precision; h and w count tokens.
    """

    name: str
    config: dict
    draw_inputs: Callable[..., dict]

    # Tokens of the default input, and which of the model's outputs `call` returns.
    default_grid: ClassVar[tuple[int, int]] = (5, 7)
    output: ClassVar[int] = 0

    def build(self, seed: int = 0, **config) -> Any:
        torch.manual_seed(seed)
        model = getattr(diffusers, self.name)(**self.config | config).eval()
        randomize_zeros(model, std=0.2)
        return model

    def inputs(
        self,
        batch: int = 2,
        h: int | None = None,
        w: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict:
        """What a pipeline would call the model with."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # The same numbers in every precision.
            return torch.randn(shape, generator=generator).to(dtype)

        rows, columns = self.default_grid
        return self.draw_inputs(batch, h or rows, w or columns, normal)

    def call(
        self,
        model: Any,
        batch: int = 2,
        h: int | None = None,
        w: int | None = None,
        seed: int = 0,
        **given,
    ) -> Tensor:
        """The model's output; given: in place of the inputs of these names."""
        inputs = self.inputs(batch, h, w, seed, model.dtype)
        output = model(**inputs | given, return_dict=False)[self.output]
        return torch.stack(output) if isinstance(output, list) else output

    @torch.no_grad()
    def predict(self, model: Any, **given) -> Tensor:
        return self.call(model, **given)


def randomize_zeros(model: nn.Module, std: float) -> None:
    """Gates and last layers start at zero: nothing of what blocks do would be seen."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)
