"""What the playground does when a control is used: from inputs to outputs, errors as sentences."""

from collections.abc import Iterator
from threading import Event
from typing import Any

import gradio as gr
import pandas as pd

from tomesd.app.reading import Reader, example, open_upload
from tomesd.app.studio import Merging, Result, Scene, StoppedError, Studio

SPEED, PSNR, SETTING = "times as fast", "PSNR, dB", "setting"
COLUMNS = [SETTING, "ratio", SPEED, PSNR]

# What the second tab compares.
SETTINGS = {
    ("default", 0.25): Merging(0.25),
    ("default", 0.5): Merging(0.5),
    ("default", 0.75): Merging(0.75),
    ("quality", 0.5): Merging(0.5, preset="quality"),
    ("quality", 0.75): Merging(0.75, preset="quality"),
    ("steady", 0.5): Merging(0.5, preset="steady"),
    ("random pruning", 0.25): Merging(0.25, method="prune"),
}

# What goes wrong because of what was typed or uploaded, or for want of memory.
MISTAKES = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)


def busy() -> tuple[Any, Any, str]:
    """The buttons and the status while something is drawn."""
    return gr.Button(interactive=False), gr.Button(interactive=True), "Drawing…"


def idle() -> tuple[Any, Any]:
    """The buttons afterwards."""
    return gr.Button(interactive=True), gr.Button(interactive=False)


class Playground:
    """The handlers of one server. Each browser session has an event that stops its drawing.

    >>> play = Playground(Studio(), Reader())
    """

    def __init__(self, studio: Studio, reader: Reader) -> None:
        self.studio = studio
        self.reader = reader
        self._stops: dict[str, Event] = {}

    def stop(self, request: gr.Request) -> str:
        """Stop what this session draws, after the current step."""
        if event := self._stops.get(request.session_hash or ""):
            event.set()
        return "Stopping after this step…"

    def draw(
        self,
        prompt: str,
        model: str,
        seed: float,
        steps: float,
        ratio: float,
        levels: int,
        since: float,
        preset: str,
        method: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it by its default.
    ) -> list[Any]:
        """The three images, their figures, the result for the map, its sliders, and the status."""
        stop = self._new_stop(request)
        try:
            scene = _scene(prompt, model, seed, steps)
            merging = Merging(ratio, int(levels), since, preset or None, method)
            result = self.studio.draw(scene, merging, _ticker(progress), stop)
        except StoppedError:
            return [gr.skip()] * 7 + ["Stopped."]
        except MISTAKES as error:
            return [gr.skip()] * 7 + [f"⚠️ {_sentence(error)}"]
        images = [result.unpatched.image, result.merged.image, result.difference]
        return [*images, figures(result), result, *_sliders(result), "Done."]

    def draw_map(self, result: Result | None, step: float, block: float) -> tuple[Any, str]:
        """The merge map of the last image in one of its steps and blocks."""
        if result is None or not result.maps:
            return None, "Nothing merged."
        known = [each for each in result.steps if each < step]
        return result.draw_map(known[-1] if known else result.steps[0], int(block) - 1)

    def sweep(
        self,
        prompt: str,
        model: str,
        seed: float,
        steps: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, Any, str]]:
        """The plot and its table, one point after the other."""
        stop = self._new_stop(request)
        rows: list[list[Any]] = []
        try:
            scene = _scene(prompt, model, seed, steps)
            names = {f"{name}, {ratio}": each for (name, ratio), each in SETTINGS.items()}
            drawn = self.studio.sweep(scene, names, _ticker(progress), stop)
            for (name, ratio), (_, result) in zip(SETTINGS, drawn, strict=True):
                rows.append([name, ratio, round(result.speedup, 2), round(result.psnr, 1)])
                # The plot waits for all of them: its colors are those of its first rows.
                table = pd.DataFrame(rows, columns=COLUMNS)
                yield gr.skip(), table, f"{len(rows)} of {len(SETTINGS)}"
        except StoppedError:
            yield gr.skip(), gr.skip(), "Stopped."
        except MISTAKES as error:
            yield gr.skip(), gr.skip(), f"⚠️ {_sentence(error)}"
        else:
            yield pd.DataFrame(rows, columns=COLUMNS), gr.skip(), "Done."

    def read(self, upload: str | None, seed: float, r: float, layer: float) -> tuple[Any, str]:
        """The merged patches of a picture and what it shows."""
        try:
            picture = open_upload(upload) if upload else example(int(seed))
            reading = self.reader.read(picture, int(r), int(layer))
        except MISTAKES as error:
            return None, f"⚠️ {_sentence(error)}"
        lines = [f"**{reading.sentence}**", "", f"{reading.tokens} of 257 tokens are left.", ""]
        for name, labels in reading.found.items():
            best = sorted(labels, key=lambda label: -labels[label])[:2]
            sure = ", ".join(f"{label} {labels[label]:.0%}" for label in best)
            lines.append(f"- {name}: {sure}")
        return reading.groups, "\n".join(lines)

    def _new_stop(self, request: gr.Request) -> Event:
        if len(self._stops) > 1000:
            self._stops.clear()
        event = self._stops[request.session_hash or ""] = Event()
        return event


def figures(result: Result) -> str:
    """Times, memory and PSNR as a table."""
    shots = {"unpatched": result.unpatched, "merged": result.merged}
    lines = ["| | seconds | peak memory | PSNR |", "|---|---|---|---|"]
    for name, shot in shots.items():
        peak = "–" if shot.peak is None else f"{shot.peak / 2**30:.2f} GiB"
        near = "–" if name == "unpatched" else f"{result.psnr:.1f} dB"
        lines.append(f"| {name} | {shot.seconds:.2f} | {peak} | {near} |")
    note = "\n\nOne run each; the merged one also records the map." if result.maps else ""
    return "\n".join(lines) + note


def _scene(prompt: str, model: str, seed: float | None, steps: float | None) -> Scene:
    return Scene(prompt, (model or "").strip(), int(seed or 0), int(steps or 0) or None)


def _sliders(result: Result) -> tuple[Any, Any]:
    if not result.maps:
        return gr.Slider(interactive=False), gr.Slider(interactive=False)
    steps = result.steps
    blocks = result.blocks(steps[0])
    step = gr.Slider(
        steps[0] + 1,
        max(steps[-1] + 1, steps[0] + 2),
        value=steps[-1] + 1,
        interactive=len(steps) > 1,
    )
    return step, gr.Slider(1, max(blocks, 2), value=1, interactive=blocks > 1)


def _ticker(progress: gr.Progress) -> Any:
    def tick(done: int, steps: int) -> None:
        if steps:
            progress((done, steps), desc="Drawing", unit="steps")
        else:
            progress(0, desc="Loading the model")

    return tick


def _sentence(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return (line[0].upper() + line[1:]).rstrip(".") + "."
