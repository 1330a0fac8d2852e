"""The nodes for ComfyUI load as a custom node folder and run with its calling conventions."""

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import tomesd
from tests.support import stand_in_transformers
from tests.support.stand_in_comfyui import build, sample
from tests.support.stand_in_transformers import TRANSFORMERS

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes():
    """As ComfyUI loads a folder of custom_nodes: under the name of its path."""
    name = str(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[loaded]


def _run(nodes, name: str, **inputs):
    """With the defaults that its inputs have in a new workflow."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    for section in ("required", "optional"):
        for key, (kind, *options) in node.INPUT_TYPES().get(section, {}).items():
            given = options[0] if options else {}
            if isinstance(kind, tuple):
                inputs.setdefault(key, kind[0])
            elif "default" in given:
                inputs.setdefault(key, given["default"])
    result = getattr(node(), node.FUNCTION)(**inputs)
    assert len(result) == len(node.RETURN_TYPES)
    return result


def test_the_folder_is_described_for_the_registry():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert project["project"]["version"] == tomesd.__version__
    assert project["tool"]["comfy"]["PublisherId"]
    assert (FOLDER / "LICENSE").read_text() == (FOLDER.parents[1] / "LICENSE").read_text()


def test_every_node_has_a_name_a_category_and_inputs(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY
        assert "model" in node.INPUT_TYPES()["required"]
        assert hasattr(node, node.FUNCTION)


def test_token_merging_patches_a_clone_and_reports(nodes):
    model = build()
    plain = sample(model)
    clone, report = _run(nodes, "TokenMerging", model=model)
    assert clone is not model
    assert "1/1 input_blocks.1" in report
    assert not torch.equal(sample(clone), plain)
    assert torch.equal(sample(model), plain)
    again, _ = _run(nodes, "TokenMerging", model=clone, ratio=0.0)
    assert torch.equal(sample(again), plain)
    early, _ = _run(nodes, "TokenMerging", model=clone, since=0.0)
    late, _ = _run(nodes, "TokenMerging", model=clone, since=0.75)
    assert (sample(late) - plain).norm() < (sample(early) - plain).norm()


@pytest.mark.parametrize("preset", ["none", "quality", "paper"])
@pytest.mark.parametrize("levels", ["preset", "8"])
def test_every_preset_and_level_samples(nodes, preset, levels):
    clone, report = _run(nodes, "TokenMerging", model=build(), preset=preset, levels=levels)
    assert sample(clone).isfinite().all()
    everywhere = levels == "8" or preset == "paper"
    assert ("coarser than max_downsample=1" in report) != everywhere


def test_the_names_of_the_webuis_are_in_the_metadata(nodes):
    info: dict = {}
    _run(nodes, "TokenMerging", model=build(), ratio=0.5, extra_pnginfo=info)
    _run(nodes, "TokenMerging", model=build(), ratio=0.25, hires=True, extra_pnginfo=info)
    assert info == {"token_merging_ratio": 0.5, "token_merging_ratio_hr": 0.25}


def test_the_token_map_of_a_step_is_drawn_over_the_picture(nodes):
    clone, _ = _run(nodes, "TokenMerging", model=build(), since=0.5, keep_maps=True)
    sample(clone, steps=4)
    image = torch.rand(1, 80, 112, 3, generator=torch.Generator().manual_seed(0))
    drawn, report = _run(nodes, "TokenMap", model=clone, image=image)
    assert drawn.shape == image.shape
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert " 140 " in report
    assert not torch.equal(drawn, _run(nodes, "TokenMap", model=clone, image=image, step=2)[0])
    with pytest.raises(ValueError, match=r"one of \[2, 3\], got 0"):
        _run(nodes, "TokenMap", model=clone, image=image, step=0)
    with pytest.raises(ValueError, match="with keep_maps"):
        _run(nodes, "TokenMap", model=build(), image=image)


def test_the_node_of_old_workflows_has_its_inputs_and_is_replaced(nodes):
    inputs = nodes.NODE_CLASS_MAPPINGS["TomePatchModel"].INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "ratio"]
    assert inputs["ratio"][1]["default"] == 0.3
    (clone,) = _run(nodes, "TomePatchModel", model=build(), ratio=1.0)
    assert sample(clone).isfinite().all()

    def tomesd_m(q, k, v, options):
        raise AssertionError("the built-in node's patch is still there")

    old = build()
    old.set_model_attn1_patch(tomesd_m)
    clone, _ = _run(nodes, "TokenMerging", model=old)
    sample(clone)
    assert "beside" not in str(tomesd.report(clone))
    with pytest.raises(AssertionError, match="still there"):
        sample(old)


@pytest.mark.parametrize(("name", "frames"), [("Flux", None), ("Qwen-Image", 1), ("Wan", 3)])
def test_a_transformer_of_comfyui_merges_and_its_map_is_drawn(nodes, name, frames):
    model = build(model=stand_in_transformers.build(TRANSFORMERS[name]))
    clone, _ = _run(nodes, "TokenMerging", model=model, since=0.5, keep_maps=True)
    assert not torch.equal(sample(clone, frames=frames), sample(model, frames=frames))
    # A video's pictures are four times as many, but one.
    image = torch.rand(9 if frames == 3 else 1, 80, 112, 3)
    drawn, report = _run(nodes, "TokenMap", model=clone, image=image)
    assert drawn.shape == image.shape
    assert f" {35 * (frames or 1)} " in report
    with pytest.raises(ValueError, match="merge_block must be True"):
        _run(nodes, "TokenMerging", model=model, preset="quality")


def test_of_an_image_with_reference_images_its_own_map_is_drawn(nodes):
    transformer = stand_in_transformers.build(TRANSFORMERS["Flux"])
    clone, _ = _run(nodes, "TokenMerging", model=build(model=transformer), keep_maps=True)
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"ref_latents": [torch.rand(2, 4, 8, 6)]}),
        with_kwargs=True,
    )
    sample(clone)
    drawn, report = _run(nodes, "TokenMap", model=clone, image=torch.rand(1, 80, 112, 3))
    assert drawn.shape == (1, 80, 112, 3)
    assert " 47 " in report


@pytest.fixture
def previews(monkeypatch):
    """What ComfyUI's page is sent: its modules, as the nodes and its samplers call them."""
    sent = []

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, x0):
            h, w = x0.shape[-2:]
            return preview_format, Image.new("RGB", (w, h)), 512

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            sent.append((value, preview))

    module = ModuleType("latent_preview")
    module.get_previewer = lambda device, latent_format: Previewer()
    utils = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    monkeypatch.setitem(sys.modules, "latent_preview", module)
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    return sent


def test_merged_tokens_are_drawn_over_the_preview_of_each_step_that_merges(nodes, previews):
    clone, _ = _run(nodes, "TokenMerging", model=build(), since=0.5, preview=True)
    called = []
    with_preview = sample(clone, callback=lambda *args: called.append(args[0]))
    assert called == [0, 1, 2, 3]
    assert [value for value, _ in previews] == [3, 4]
    for _, (kind, picture, longest) in previews:
        assert (kind, picture.size, longest) == ("JPEG", (36 * 14, 36 * 10), 512)
        assert picture.getcolors() is None or len(picture.getcolors()) > 1
    previews.clear()
    without, _ = _run(nodes, "TokenMerging", model=clone, since=0.5)
    assert torch.equal(sample(without), with_preview)
    assert not previews
    removed, _ = _run(nodes, "TokenMerging", model=clone, ratio=0.0)
    sample(removed)
    assert not previews


def test_without_previews_in_comfyui_none_is_sent(nodes, previews, monkeypatch):
    monkeypatch.setattr(sys.modules["latent_preview"], "get_previewer", lambda *args: None)
    sample(_run(nodes, "TokenMerging", model=build(), preview=True)[0])
    assert not previews
