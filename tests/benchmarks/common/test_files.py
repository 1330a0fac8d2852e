"""Pictures are written whole or not at all, never over one another by accident."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.common.files import check_file, check_folder
from tomesd.pictures.files import atomic_write, check_output, destination, save_image, versions

PICTURE = Image.new("RGB", (8, 8), "red")


def test_metadata_is_read_back_unchanged(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    save_image(PICTURE, path, {"prompt": "ein rotes Herz ♥ 心", "seed": 7})
    with Image.open(path) as image:
        assert image.text == {"prompt": "ein rotes Herz ♥ 心", "seed": "7"}
        assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def write():
        with atomic_write(path) as partial:
            partial.write_bytes(b"half of the ne")
            raise stop

    with pytest.raises(stop):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_seen_before_it_is_complete(tmp_path):
    path = tmp_path / "a.png"
    with atomic_write(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        # A glob for pictures must not find it either.
        assert not list(tmp_path.glob("*.png"))
    assert path.read_bytes() == b"half"


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with atomic_write(path) as partial:
            partial.write_bytes(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_folder_gives_every_picture_the_next_free_name(tmp_path):
    names = []
    for _ in range(3):
        names.append(destination(tmp_path))
        save_image(PICTURE, names[-1], {})
    assert [name.name for name in names] == ["00001.png", "00002.png", "00003.png"]
    names[1].unlink()
    (tmp_path / "heart.png").touch()
    assert destination(tmp_path).name == "00004.png"


def test_a_file_is_numbered_only_for_several_pictures():
    assert destination(Path("a/heart.png")) == Path("a/heart.png")
    several = [destination(Path("a/heart.png"), index, 2).name for index in range(2)]
    assert several == ["heart-0.png", "heart-1.png"]


def test_a_folder_may_have_a_name_like_a_file(tmp_path):
    for name in ("v1.5", "all.png"):
        (tmp_path / name).mkdir()
        check_output(tmp_path / name)
        assert destination(tmp_path / name) == tmp_path / name / "00001.png"


@pytest.mark.parametrize("name", ["a.jpg", "file.png/a.png", "file.png/folder"])
def test_an_impossible_output_is_refused_and_creates_nothing(tmp_path, name):
    (tmp_path / "file.png").touch()
    with pytest.raises(ValueError, match=r"^output must be .*, got '.*'"):
        check_output(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file.png"]


@pytest.mark.parametrize(
    ("check", "name", "message"),
    [
        (check_folder, "file.png", "output must be a folder, got the file"),
        (check_folder, "table.png", "output must be a folder, got a picture's name"),
        (check_folder, "file.png/folder", "output must be in a writable folder"),
        (check_file, "folder", "output must be a file, got the folder"),
        (check_file, "file.png/a.json", "output must be in a writable folder"),
    ],
)
def test_a_file_in_place_of_a_folder_is_refused_and_vice_versa(tmp_path, check, name, message):
    (tmp_path / "file.png").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"^{message}.*'.*{name}'"):
        check(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that takes no files")
@pytest.mark.parametrize("check", [check_output, check_folder, check_file])
def test_a_folder_that_takes_no_files_is_refused_whatever_its_permissions(check):
    with pytest.raises(ValueError, match=r"writable folder, got '/proc/nowhere/x.y': "):
        check(Path("/proc/nowhere/x.y"))


@pytest.mark.parametrize("check", [check_output, check_folder])
def test_a_folder_may_have_a_version_in_its_name(tmp_path, check):
    check(tmp_path / "runs" / "sd1.5")


def test_checking_an_output_creates_no_folders(tmp_path):
    check_output(tmp_path / "new" / "folder" / "a.png")
    check_folder(tmp_path / "new" / "folder")
    check_file(tmp_path / "new" / "folder" / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_not_installed_says_so():
    found = versions("pytest", "no-such-package")
    assert found == {
        "pytest_version": pytest.__version__,
        "no-such-package_version": "not installed",
    }
