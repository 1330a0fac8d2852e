"""How a model whose token grid is in its data learns it, where a compiler would not look at data.

Imported only for such models: both decorators import the compiler.
"""

from typing import Any

import torch
from torch import nn

from tomesd.hooks import by_name


# A model's own hooks are no part of its graph, so that this may look at the data. The compiled code
# depends on the grid alone: there is a version for each, or one for all of them.
@torch.compiler.disable
def note_grids(model: Any, args: tuple, kwargs: dict) -> None:
    """Note the grids for the thread that calls the model, before it runs."""
    hooks = model._tomesd_patch.hooks
    given = by_name(hooks.names, args, kwargs)
    hooks.run.grids = hooks.family.grids(model, given)


@torch.compiler.substitute_in_graph(note_grids, skip_signature_check=True)
def _noted_nowhere(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """What is compiled instead where the model is a part of something that is compiled: there,
    its hooks are in the graph."""
