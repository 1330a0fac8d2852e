"""Only pixels of an uploaded picture are read, and only of known formats."""

import pytest
from PIL import Image

from tomesd.app import reading
from tomesd.app.reading import Reader, example, open_upload


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_opened(tmp_path, kind):
    path = tmp_path / "upload"
    Image.new("RGB", (8, 8)).save(path, format=kind)
    assert open_upload(str(path)).size == (8, 8)


def test_other_files_and_huge_pictures_are_refused_with_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "upload.png"
    path.write_text("import os")
    with pytest.raises(ValueError, match="This file is not a PNG, JPEG or WebP"):
        open_upload(str(path))
    Image.new("RGB", (8, 8)).save(path, format="GIF")
    with pytest.raises(ValueError, match="This file is not a PNG"):
        open_upload(str(path))
    monkeypatch.setattr(reading, "MOST_PIXELS", 16)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="Images may have at most"):
        open_upload(str(path))


def test_more_tokens_merge_as_r_grows():
    reader = Reader()
    left = [reader.read(example(3), r, 12).tokens for r in (0, 8, 16)]
    assert left == [257, 161, 65]
