"""How a model whose token grid is in its data learns it, since a compiler cannot read data.

Imported only for such models: both decorators import the compiler.
"""

from typing import Any

import torch
from torch import nn

from tomesd.hooks import PATCH, by_name


# A model's own hooks are not part of its graph, so this may read data. The compiled code depends on
# the grid alone: there is one version for each, or one for all of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def record_grids(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record the grids for the thread that calls the model, before it runs."""
    if torch.compiler.is_exporting():
        raise TypeError(
            f"torch.export cannot export a patched {type(model).__name__}, whose token grid is "
            "read from the values of an input: remove_patch first, or use torch.jit.trace, "
            "which keeps the grid of its example"
        )
    hooks = getattr(model, PATCH).hooks
    given = by_name(hooks.names, args, kwargs)
    try:
        hooks.state.grids = hooks.spec.grids(model, given)
    except RuntimeError as error:
        if torch._C._functorch.peek_interpreter_stack() is None:
            raise
        raise TypeError(
            f"torch.func.vmap cannot map over the positions of a patched {type(model).__name__}, "
            "whose token grid is read from them: pass them with in_dims=None"
        ) from error


@torch.compiler.substitute_in_graph(record_grids, skip_signature_check=True)
def _record_nothing(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What is compiled instead if the model is part of something that is compiled: its hooks are
    then in the graph."""
