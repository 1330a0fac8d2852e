"""The cost model's tables count whole models as torch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import command, counts
from benchmarks.models.transformers import SD3
from tests.support.tiny_unets import sd_unet
from tomesd.core import workload
from tomesd.core.workload import Branches

TINY_SD3 = counts.Model(
    "tiny SD3",
    "SD3Transformer2DModel",
    SD3
    | {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
    },
    batch=2,
    text_tokens=5,
)
TINY_FLUX = counts.Model(
    "tiny Flux",
    "FluxTransformer2DModel",
    {
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    },
    batch=1,
    text_tokens=5,
)


@pytest.mark.parametrize("model", [TINY_SD3, TINY_FLUX], ids=lambda model: model.title)
def test_a_joint_block_s_flops_are_those_that_torch_counts_without_its_modulation(model):
    denoiser, args, kwargs = counts._empty(model, 128, model.batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(*args, **kwargs)
    [level] = counts._joint_levels(denoiser, 128)
    expected = workload.flops(
        workload.joint_block(model.batch, 64, level.channels, text_tokens=model.text_tokens)
    )
    counted = counter.get_flop_counts()
    root = type(denoiser).__name__
    # SD3's last block gives its text to nobody and leaves out a part of it.
    names = ["transformer_blocks.0", "single_transformer_blocks.1"]
    found = [name for name in names if f"{root}.{name}" in counted]
    assert level.blocks == {"tiny SD3": 2, "tiny Flux": 3}[model.title]
    assert len(found) == {"tiny SD3": 1, "tiny Flux": 2}[model.title]
    for name in found:
        norms = [f"{root}.{name}.{norm}" for norm in ("norm", "norm1", "norm1_context")]
        modulation = sum(sum(counted[norm].values()) for norm in norms if norm in counted)
        assert modulation > 0
        assert sum(counted[f"{root}.{name}"].values()) - modulation == expected


def test_a_models_flops_and_levels_are_those_that_torch_counts():
    config = dict(sd_unet().config)
    tiny = counts.Model("tiny", "UNet2DConditionModel", config, 2, 77)
    small, large = (counts.count(tiny, size) for size in (128, 256))
    # Convolutions are linear in pixels and attention to the text in tokens; self-attention is not.
    assert large.convolutions == 4 * small.convolutions
    assert 4 * small.attention < large.attention < 16 * small.attention
    assert [(level.h, level.channels, level.blocks) for level in large.levels] == [
        (32, 16, 3),
        (16, 32, 3),
        (8, 32, 1),
    ]
    inside = sum(level.blocks * workload.flops(large.block(level)) for level in large.levels)
    # Besides there are time embeddings and the projections around blocks.
    assert 0 < large.attention < inside < large.attention + large.linear
    assert large.ideal(0.0, Branches()) == 1
    finest, everywhere = (large.ideal(0.5, Branches(), where) for where in (False, True))
    assert 1 < finest < everywhere < large.flops / large.convolutions


@pytest.mark.parametrize("size", [0, 500, -64])
def test_a_size_that_models_cannot_take_is_refused(size):
    with pytest.raises(ValueError, match=f"size must be a positive multiple of 64, got {size}"):
        counts.count(TINY_SD3, size)


def test_the_command_prints_a_table_of_each_kind(monkeypatch, capsys):
    monkeypatch.setitem(command.MODELS, "sd3", TINY_SD3)
    command.main(["--model", "sd3", "--size", "128", "256"])
    tables = capsys.readouterr().out.strip().split("\n\n")
    # A line for each size, for what is merged in three ways each; a heading; a line below it.
    assert [len(table.splitlines()) for table in tables] == [2 + 2, 2 + 2, 2 + 2, 2 + 6, 2 + 2]
    for table in tables:
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1


def test_the_command_refuses_a_size_before_any_work(capsys):
    with pytest.raises(SystemExit):
        command.main(["--size", "512", "500"])
    assert "--size must be a multiple of 64, got 500" in capsys.readouterr().err
