"""The examples (`>>>`) in docstrings: how they run, and the names that they take for granted.

A name stands for something tiny that is made when an example first uses it. What is patched in an
example may be so already, so that an example of `report`, say, need not begin with `apply_patch`.
"""

import ast
import builtins
import doctest
import math
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import tomesd
from tests.support import tiny_ldm, tiny_transformers, tiny_unets, tiny_vits
from tests.support.tiny_pipelines import sample, sd_pipeline
from tomesd import registry


def modules(package: ModuleType) -> list[str]:
    """The names of a package and of all modules in it."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [package.__name__, *(module.name for module in found)]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples."""
    found = doctest.DocTestFinder().find(module, module.__name__)
    return [test for test in found if test.examples]


def free_names(test: doctest.DocTest) -> set[str]:
    """What an example uses and neither it, its module, nor Python defines."""
    found: set[str] = set()
    bound = {name for name, value in test.globs.items() if not _is_replaced(name, value)}
    bound |= set(vars(builtins))
    for example in test.examples:
        tree = ast.parse(example.source)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        if not isinstance(tree.body[0], ast.Assign):  # x = f(x) uses an x from before.
            local |= stored
        found |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound - local
        bound |= stored
        if isinstance(tree.body[0], ast.Import | ast.ImportFrom):
            bound |= {each.asname or each.name for each in tree.body[0].names}
    return found


def _is_replaced(name: str, value: Any) -> bool:
    """In the docstring of a package, `vit` is a model and not the folder of that name."""
    return name in NAMES and isinstance(value, ModuleType) and name != value.__name__


def run(test: doctest.DocTest) -> str:
    """Run the examples of a docstring; returns what went wrong."""
    name = test.name.rpartition(".")[2]
    own = OWN_NAMES.get(name, {})
    for free in free_names(test):
        if make := own.get(free) or NAMES.get(free):
            test.globs[free] = make()
    said: list[str] = []
    doctest.DocTestRunner(_Checker(), optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    return "".join(said)


class _Checker(doctest.OutputChecker):
    """An example that shows no output may have any."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def _picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((56, 56))


def _vit() -> VisionTransformer:
    """As deep as a ViT-B, and with as many patches."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=56, patch_size=4, embed_dim=24, depth=12, num_heads=2, num_classes=5
    )
    return tomesd.apply_patch(vit.eval(), r=8)


def _images() -> torch.Tensor:
    return torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _traced_vit() -> list[tomesd.TokenGroups]:
    vit = _vit()
    with tomesd.trace(vit) as traced:
        vit(_images())
    return traced


def _pipe() -> Any:
    """With two blocks at each level, as Stable Diffusion has."""
    return tomesd.apply_patch(sd_pipeline(layers_per_block=2), ratio=0.5)


def _transformer() -> Any:
    return tiny_transformers.TINY[tiny_transformers.FLUX].build()


def _traced_pipe() -> list[tomesd.TokenGroups]:
    """Of 25 steps."""
    pipe = _pipe()
    with tomesd.trace(pipe) as traced:
        sample(pipe, num_inference_steps=25, height=56, width=56)
    return traced


@torch.no_grad()
def _traced_video() -> list[tomesd.TokenGroups]:
    vit = tiny_vits.build("VideoMAE")
    tomesd.apply_patch(vit.model, r=3)
    with tomesd.trace(vit.model) as traced:
        vit.output()
    return traced


NAMES: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch,
    "tomesd": lambda: tomesd,
    "prompt": lambda: "a cat",
    "pipe": _pipe,
    "timestep": lambda: sd_pipeline().scheduler.timesteps[0],
    "unet": tiny_unets.sd_unet,
    "transformer": _transformer,
    "vit": _vit,
    "images": _images,
    "traced": _traced_vit,
    "picture": _picture,
    "image": _picture,
    "math": lambda: math,
    **dict.fromkeys("abcd", _picture),
}
# Of the docstring of something with this name.
OWN_NAMES: dict[str, dict[str, Callable[[], Any]]] = {
    "draw_frames": {"traced": _traced_video, "frames": lambda: [_picture()] * 4},
    "steps_picture": {"traced": _traced_pipe},
    "LDMPatch": {"unet": tiny_ldm.stand_in},
    "DiTPatch": {"spec": lambda: registry.find(_transformer())},
    "UNetPatch": {"spec": lambda: registry.find(tiny_unets.sd_unet())},
    "ViTPatch": {"spec": lambda: registry.find(_vit())},
    "ssim": {"picture": lambda: np.asarray(_picture())},
}
