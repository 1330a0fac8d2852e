"""scripts/train_shapes.py resumes its own checkpoints only, and replaces models atomically."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.common.files import atomic_folder
from benchmarks.training import architectures
from benchmarks.training.shapes_command import main
from benchmarks.training.shapes_models import scaled_latents
from tests.benchmarks.support import refused
from tomesd.shapes import names

FEW = ["--pictures", "4", "--steps-scale", "0.0005", "--precision", "fp32", "--no-compile"]
FEW += ["--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the first stage's checkpoint. Not to be written to."""
    work = tmp_path_factory.mktemp("work")
    main([*FEW, "--stage", "autoencoder", "--work", str(work), "--output", str(work / "models")])
    return work


def held(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["all", "autoencoder"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--steps-scale", "0.001"], "steps=1 in it, 2 now"),
        (["--pictures", "5"], "pictures=4 in it, 5 now"),
        (["--precision", "bf16"], "precision='fp32' in it, 'bf16' now"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_before_any_work(
    trained, capsys, stage, changed, said
):
    before = held(trained)
    where = ["--work", str(trained), "--output", str(trained / "models")]
    message = refused(main, [*FEW, *changed, "--stage", stage, *where], capsys)
    assert "autoencoder.pt is of another training" in message
    assert said in message
    assert held(trained) == before


def test_a_denoiser_of_another_autoencoder_is_refused(trained, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    settings = main.prepare(main.parser().parse_args([*FEW, "--work", str(work)])).settings
    stage = vars(settings.stages["denoiser-64"])
    metadata = settings.metadata | stage | {"autoencoder": "another"}
    torch.save({"metadata": metadata}, work / "denoiser-64.pt")
    with pytest.raises(SystemExit) as stopped:
        main([*FEW, "--stage", "denoiser", "--work", str(work), "--output", str(tmp_path / "out")])
    assert "denoiser-64.pt is of another training: autoencoder='another' in it" in str(
        stopped.value
    )
    assert not (tmp_path / "out").exists()


def test_latents_of_another_autoencoder_are_not_reused(tmp_path):
    settings = main.prepare(main.parser().parse_args([*FEW, "--work", str(tmp_path)])).settings
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = architectures.build_autoencoder().eval()
        made.append(scaled_latents(settings, model, f"made-by-{seed}", 64).clone())
    assert made[0].shape == made[1].shape
    assert not torch.allclose(made[0], made[1])
    (file,) = tmp_path.glob("latents-*.pt")
    assert "made-by-1" in file.name


def test_the_default_output_does_not_replace_the_embedded_models():
    args = main.parser().parse_args([])
    assert args.output.resolve() != names.ASSETS
    assert args.output == Path("runs/shapes/models")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_model_is_replaced_atomically(tmp_path, error):
    path = tmp_path / "models" / "classifier"
    with atomic_folder(path) as partial:
        (partial / "weights").write_text("old")
        (partial / "gone").write_text("old")
        assert not path.exists()

    def stop_halfway() -> None:
        with atomic_folder(path) as partial:
            (partial / "weights").write_text("ha")
            raise error

    with pytest.raises(error):
        stop_halfway()
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "weights": "old",
        "gone": "old",
    }
    with atomic_folder(path) as partial:
        (partial / "weights").write_text("new")
    assert {file.name: file.read_text() for file in path.iterdir()} == {"weights": "new"}
    assert list(path.parent.iterdir()) == [path]


def test_a_model_that_a_killed_run_had_moved_is_restored(tmp_path):
    (tmp_path / ".classifier.old").mkdir()
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "classifier"):
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "0"], "must be a whole number from 1 to 1000000, got '0'"),
        (["--steps-scale", "-1"], "must be a number from 0.0001 to 100, got '-1'"),
        (["--device", "abacus"], "device must be one of cuda, mps, cpu, got 'abacus'"),
        (["--output", "/proc/x"], "--output: output must be in a writable folder, got '/proc/x'"),
        (["--work", "/proc/x"], "--work: output must be in a writable folder, got '/proc/x'"),
        (["--stage", "denoiser"], "which --stage autoencoder makes"),
    ],
)
def test_bad_input_is_named_before_any_work(tmp_path, capsys, options, message):
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    assert message in refused(main, [*where, *options], capsys)
    assert not list(tmp_path.iterdir())
