"""A visitor who opens both tabs at once gets both models."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("gradio")

from tomesd.app import reading, studio


class Loads:
    """A loader that takes a while, and counts how many run at the same time."""

    def __init__(self) -> None:
        self.running = self.most = 0

    def __call__(self, *args: object) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.1)
        self.running -= 1
        raise OSError("nothing to load")


def test_the_pipeline_and_the_classifier_are_not_loaded_at_the_same_time(monkeypatch):
    loads = Loads()
    monkeypatch.setattr(studio.sampling, "load_pipeline", loads)
    monkeypatch.setattr(reading, "load_classifier", loads)
    with ThreadPoolExecutor() as pool:
        drawn = pool.submit(
            studio.Studio().draw, studio.Scene("a star", steps=1), studio.Merging(0.5)
        )
        read = pool.submit(reading.Reader().read, reading.example(3), 8, 12)
        for future in (drawn, read):
            with pytest.raises(OSError, match="nothing to load"):
                future.result(timeout=60)
    assert loads.most == 1
