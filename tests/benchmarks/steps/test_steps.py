"""scripts/steps.py: recipes of equal work, and a run that resumes."""

import json

import pytest

from benchmarks.steps import table_and_plot
from benchmarks.steps.command import main
from benchmarks.steps.recipes import BlocksForWork, RatioForWork, calibrated_recipes, recipes
from tests.support.slow import slow

RATIO_FOR = RatioForWork({0.25: 0.7, 0.5: 0.45, 0.75: 0.25})


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_late_recipes_leave_the_share_of_the_work_that_their_name_says(steps):
    for recipe in recipes(steps, RATIO_FOR):
        name, _, share = recipe.name.rpartition(" ")
        if name == "merge late":
            (since, whole), (_, ratio) = recipe.merging["ratio"].pieces
            assert whole == 0
            left = {RATIO_FOR(w / 1000): w / 1000 for w in range(250, 1000)}
            nearest = min(left, key=lambda each: abs(each - ratio))
            assert since + (1 - since) * left[nearest] == pytest.approx(float(share), abs=0.01)


def test_work_that_no_ratio_reaches_has_no_recipe():
    assert RATIO_FOR(0.2) is None
    assert RATIO_FOR(1.0) is None
    assert {each.name for each in recipes(1, RATIO_FOR)} == {
        *("default", "steady", "merge 0.4", "merge 0.6", "merge 0.8")
    }


@slow
def test_a_run_measures_and_resumes(tmp_path, capsys):
    options = [
        "--models",
        "unet",
        "--steps",
        "2",
        "--seeds",
        "0",
        "--num-images",
        "1",
        "--device",
        "cpu",
        "--output",
    ]
    main([*options, str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"whole", "merge 0.6", "merge late 0.8", "cache 0.4"} <= {row["recipe"] for row in rows}
    for row in rows:
        name, _, share = row["recipe"].rpartition(" ")
        if name in ("merge", "merge late"):
            assert row["work"] == pytest.approx(float(share), abs=0.02)
    main([*options, str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows


def test_ratios_by_block_stand_beside_one_for_all_at_the_same_work():
    curves = {"a": [(0, 0, 0), (0.75, 1, 60.0)], "b": [(0, 0, 0), (0.75, 9, 20.0)]}
    blocks_for = BlocksForWork(curves, work=100.0)
    assert blocks_for(0.1) is None
    assert blocks_for(0.7) == {"a": 0.375}
    found = calibrated_recipes(4, RatioForWork({0.25: 0.7, 0.75: 0.2}), blocks_for)
    late = next(each for each in found if each.name == "merge late by block 0.6")
    assert late.merging["ratio"]["a"].pieces[0] == (0.25, 0.0)
    assert [each.name for each in found][2:4] == ["merge 0.6", "merge by block 0.6"]
    rows = [{"model": "unet", "steps": 4, "recipe": "merge by block 0.6", "psnr": 35.94}]
    assert "| unet | 4 | 60% | – | 35.9 | – | – |" in table_and_plot.by_block(rows)
