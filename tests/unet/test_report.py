"""The report says what merges where, what does not and why, and what it saves."""

import pytest
from diffusers import StableDiffusionControlNetPipeline

import tomesd
from tests.support.tiny_pipelines import build_pipeline, sd_components, sd_pipeline
from tests.support.tiny_unets import controlnet, predict, sd_unet, sdxl_unet


def _rows(model) -> list:
    (rows,) = tomesd.report(model).rows.values()
    return rows


def test_it_counts_blocks_and_tokens_of_every_level():
    rows = _rows(tomesd.apply_patch(sd_unet(), ratio=0.5))
    # Sizes of the model's own 16×16 latents; the decoder has one transformer more in each level.
    assert [(row.where, row.blocks, row.tokens, row.merged) for row in rows] == [
        ("1/1 down_blocks.0", 1, 256, 128),
        ("1/2 down_blocks.1", 1, 64, 64),
        ("1/4 mid_block", 1, 16, 16),
        ("1/2 up_blocks.1", 2, 64, 64),
        ("1/1 up_blocks.2", 2, 256, 128),
    ]


def test_its_blocks_are_all_blocks_of_the_model():
    for unet in (sd_unet(layers_per_block=2), sdxl_unet()):
        blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
        assert sum(row.blocks for row in _rows(tomesd.apply_patch(unet))) == len(blocks)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"ratio": 0.5}, 0.25),
        ({"ratio": 0.75}, 0.0625),
        ({"ratio": 0.75, "merge_queries": False}, 0.25),
        ({"ratio": 0.5, "method": "prune"}, 0.25),
        ({"ratio": 0.5, "merge_attn": False, "merge_mlp": True}, 1.0),
    ],
    ids=str,
)
def test_it_says_how_much_attention_is_left(settings, left):
    rows = _rows(tomesd.apply_patch(sd_unet(), **settings))
    assert rows[0].work == left
    assert rows[1].work == 1.0
    total = 3 * 256**2 + 3 * 64**2 + 16**2
    saved = (1 - left) * 3 * 256**2 / total
    unet = tomesd.apply_patch(sd_unet(), **settings)
    assert str(tomesd.report(unet)).splitlines()[-1].split() == ["all", f"{saved:.1%}"]


def test_it_says_what_is_not_patched_and_why():
    notes = {row.where: row.note for row in _rows(tomesd.apply_patch(sd_unet()))}
    assert notes["1/1 down_blocks.0"] == ""
    assert notes["1/4 mid_block"] == "coarser than max_downsample=1"
    notes = {row.note for row in _rows(tomesd.apply_patch(sd_unet(), ratio=0, max_downsample=8))}
    assert notes == {"ratio is 0"}


def test_after_a_picture_it_shows_the_real_sizes_also_where_nothing_merges():
    unet = tomesd.apply_patch(sd_unet(), ratio=0.5)
    predict(unet, h=10, w=14)
    assert [(row.tokens, row.merged) for row in _rows(unet)] == [
        (140, 70),
        (35, 35),
        (12, 12),
        (35, 35),
        (140, 70),
    ]
    predict(unet, h=14, w=16)
    assert _rows(unet)[0].tokens == 14 * 16


@pytest.mark.parametrize("sample_size", [(10, 14), 9])
def test_sizes_that_nothing_divides_are_those_that_really_run(sample_size):
    unet = tomesd.apply_patch(sd_unet(sample_size=sample_size), ratio=0.75, max_downsample=8)
    before = _rows(unet)
    h, w = sample_size if isinstance(sample_size, tuple) else (sample_size, sample_size)
    seen = []
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.attn1.to_q.register_forward_hook(
                lambda _, args, y: seen.append(args[0].shape[1])
            )
    predict(unet, h=h, w=w)
    assert _rows(unet) == before
    assert seen == [row.merged for row in before for _ in range(row.blocks)]


def test_it_prints_as_a_table():
    lines = str(tomesd.report(tomesd.apply_patch(sd_pipeline(), preset="steady"))).splitlines()
    assert lines[0].split() == ["unet", "blocks", "tokens", "merged", "to", "attention", "saved"]
    assert lines[1].split() == ["1/1", "down_blocks.0", "1", "256", "128", "75.0%"]
    assert lines[2].endswith("0.0%  coarser than max_downsample=1")
    assert len({len(line) for line in (lines[0], lines[1], lines[-1])}) == 1
    late = str(tomesd.report(tomesd.apply_patch(sd_pipeline()))).splitlines()
    assert late[1].endswith("75.0%  ratio 0, 0.5")


def test_it_covers_every_model_of_a_pipeline():
    unet = sd_unet()
    components = sd_components(unet) | {"controlnet": controlnet(unet)}
    components |= {"requires_safety_checker": False}
    pipe = tomesd.apply_patch(build_pipeline(StableDiffusionControlNetPipeline, components))
    report = tomesd.report(pipe)
    assert report.rows.keys() == {"unet", "controlnet"}
    assert [line.split()[0] for line in str(report).splitlines() if line[0] != " "] == [
        "unet",
        "controlnet",
    ]
