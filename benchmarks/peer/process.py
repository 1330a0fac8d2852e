"""tomesd==0.1.3, dbolya's package and the known implementation, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import torch

_WORKER = Path(__file__).with_name("worker.py")
_ROOT = Path(__file__).resolve().parents[2]


class PeerError(RuntimeError):
    """An error that the peer raised, with its message."""


def install_peer(requirement: str, cache: Path) -> Path:
    """Install a version of tomesd from PyPI, without its dependencies, into a folder of its own.

    >>> folder = install_peer("tomesd==0.1.3", Path("runs/peers"))

    Raises ValueError for another package or no exact version, else as `install_package`.
    """
    if not re.fullmatch(r"tomesd==\d+(\.\w+)*", requirement):
        raise ValueError(f"peer must be tomesd==<version>, got {requirement!r}")
    return install_package(requirement, cache)


def install_package(requirement: str, cache: Path) -> Path:
    """Install a version of a package from PyPI, without its dependencies, into a folder of its own.

    >>> folder = install_package("DeepCache==0.1.1", Path("runs/peers"))

    Returns the folder, for PYTHONPATH; an existing one is used as it is.
    Raises OSError with pip's message if it cannot be installed.
    """
    folder = cache / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as partial:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", f"{partial}/package", requirement], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise OSError(f"pip could not install {requirement}:\n{done.stderr.strip()}")
        Path(partial, "package").rename(folder)
    return folder


class Peer:
    """A process that imports the peer's tomesd and keeps its models between requests.

    >>> with Peer(folder) as peer:
    ...     peer.ask("where")

    ask: sends a request of `worker.Worker` and returns its answer. Raises PeerError if the peer
    raised or its process ended.
    """

    def __init__(self, folder: Path):
        # -P: not the worker's own folder on the path. The peer's folder comes before this project.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder.resolve(), _ROOT)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        where = Path(self.ask("where")).resolve()
        if folder.resolve() not in where.parents:
            self.close()
            raise PeerError(f"the peer must come from {folder}, but {where} was imported")

    def ask(self, do: str, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"its process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Kill the process, which frees its memory."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PeerPipeline:
    """A patched pipeline in the peer's process, which `sample` takes like any other.

    >>> peer.ask("load_pipeline", folder="assets/pipeline", device="cpu", dtype="float32")
    >>> pipe = PeerPipeline(lambda: peer, {"ratio": 0.5}, torch.float32)
    >>> images = list(sample(pipe, ["a photo of a red heart"], [0], Sampling(25, 4.0)))

    start: returns the peer with its pipeline, called for the first picture. settings: the arguments
    of the peer's `apply_patch`. dtype: the pipeline's.
    Each call patches again and seeds the peer's global random state, which it may use, with its
    first picture's seed, so that a picture does not depend on earlier ones.
    """

    def __init__(self, start: Callable[[], Peer], settings: dict[str, Any], dtype: torch.dtype):
        self.start = start
        self.settings = settings
        self.dtype = dtype

    def __call__(
        self, prompts: list[str], generator: list[torch.Generator], **options: Any
    ) -> SimpleNamespace:
        seeds = [each.initial_seed() for each in generator]
        with TemporaryDirectory() as folder:
            file = Path(folder, "images.npy")
            request = {"prompts": prompts, "seeds": seeds, "options": options, "file": str(file)}
            self.start().ask("sample", settings=self.settings, **request)
            return SimpleNamespace(images=np.load(file))

    def numpy_to_pil(self, images: np.ndarray) -> list:
        from diffusers import DiffusionPipeline  # Late: the import takes seconds.

        return DiffusionPipeline.numpy_to_pil(images)
