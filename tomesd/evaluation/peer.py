"""PyPI's tomesd in a process of its own, to be timed beside this one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

_WORKER = Path(__file__).with_name("peer_worker.py")


class PeerError(RuntimeError):
    """The peer raised; the message is its own."""


def install_peer(requirement: str, cache: Path) -> Path:
    """Install a release of tomesd from PyPI, without its dependencies, into a folder of its own.

    >>> folder = install_peer("tomesd==0.1.3", Path("runs/peers"))

    Returns the folder, which goes on PYTHONPATH; one that is there already is used as it is.
    Raises ValueError for another package or no exact version, and RuntimeError with pip's words if
    it cannot be installed.
    """
    if not re.fullmatch(r"tomesd==\d+(\.\w+)*", requirement):
        raise ValueError(f"peer must be tomesd==<version>, got {requirement!r}")
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
            raise RuntimeError(f"pip could not install {requirement}:\n{done.stderr.strip()}")
        Path(partial, "package").rename(folder)
    return folder


class Peer:
    """The other release, in a process that keeps its models between requests.

    >>> with Peer(folder) as peer:
    ...     peer.ask("where")

    ask: sends a request of `peer_worker.Worker` and returns its answer. Raises PeerError if the
    peer raised, and also if its process ended.
    """

    def __init__(self, folder: Path):
        # -P: without the worker's own folder on the path, only the peer's and the libraries'.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
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
        """End the process and give its memory back."""
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
