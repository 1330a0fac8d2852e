"""A ratio for each block of a diffusion transformer, given or found by calibrate."""

import pytest
import torch

import tomesd
from tests.support.tiny_transformers import TINY
from tomesd import calibration


class _Pipeline:
    """A pipeline as far as `calibrate` knows one: components and a call."""

    def __init__(self, name: str):
        self.tiny = TINY[name]
        self.transformer = self.tiny.build()

    @property
    def components(self) -> dict:
        return {"transformer": self.transformer}

    def __call__(self, prompt, generator, output_type):
        self.tiny.call(self.transformer)


@torch.no_grad()
def test_one_block_merges_and_the_report_says_which_ratio():
    tiny = TINY["FluxTransformer2DModel"]
    model = tiny.build()
    plain = tiny.call(model)
    name = "single_transformer_blocks.0"
    with tomesd.patched(model, ratio={name: 0.5}), tomesd.trace(model) as traced:
        assert not torch.equal(tiny.call(model), plain)
        (rows,) = tomesd.report(model).rows.values()
    assert {
        groups.where for groups in traced if groups.group.max() + 1 < groups.group.shape[1]
    } == {name}
    assert sum(row.blocks for row in rows if row.merged < row.tokens) == 1
    with pytest.raises(ValueError, match=r"blocks that can merge, such as transformer_blocks.0"):
        tomesd.apply_patch(model, ratio={"down_blocks.0": 0.5})


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel"])
def test_calibrating_a_transformer_gives_ratios_of_its_blocks(name, monkeypatch):
    monkeypatch.setattr(calibration, "_RATIOS", (0.25, 0.75))  # A third of the forwards.
    pipe = _Pipeline(name)
    found = tomesd.calibrate(pipe, ["a cat"], speedup=1.05)
    names = dict(pipe.transformer.named_modules())
    assert found
    assert found.keys() <= names.keys()
    alike = tomesd.calibrate(pipe, ["a cat"], similarity=-0.999)
    assert set(alike.values()) == {0.75}
    tomesd.apply_patch(pipe, ratio=found)
    assert torch.isfinite(pipe.tiny.call(pipe.transformer)).all()
