"""The playground's page: its tabs, and what the controls do."""

from typing import Any

import gradio as gr

from tomesd.app import handlers
from tomesd.app.handlers import Playground
from tomesd.app.reading import LAYERS, MOST_R, Reader
from tomesd.app.studio import Studio
from tomesd.diffusion.settings import METHODS, PRESETS
from tomesd.shapes.names import DEFAULT, available

PROMPT = "a photo of a red heart on a blue striped background"
# Beside the embedded ones.
MODELS = [
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "black-forest-labs/FLUX.1-schnell",
]
LEVELS = [("the preset's", 0), ("finest only", 1), ("two", 2), ("three", 4), ("all", 8)]

# Fonts of the system: the theme's own would be fetched from elsewhere.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.gradio-container { max-width: 1100px !important; }
#status, #frontier-status { min-height: 1.6em; }
#figures table { width: 100%; }
#figures th, #figures td { padding: 4px 6px; font-size: 0.85em; white-space: nowrap; }
.drawn img { width: 100%; height: 100%; object-fit: contain; }
"""


def build(studio: Studio, reader: Reader) -> gr.Blocks:
    """The page.

    >>> page = build(Studio(), Reader())
    """
    play = Playground(studio, reader)
    with gr.Blocks(title="tomesd playground", analytics_enabled=False) as page:
        gr.Markdown("# tomesd playground\nMerge similar tokens and see what changes.")
        result = gr.State(None, time_to_live=3600)
        with gr.Tab("Images"):
            scene, merging, run, stop, status = _controls(studio.model)
            _images(play, scene, merging, run, stop, status, result)
        with gr.Tab("Quality over speed"):
            _frontier(play, scene)
        with gr.Tab("Classifier") as tab:
            _classifier(play, tab)
    page.queue(default_concurrency_limit=1, max_size=16)
    return page


def _controls(model: str | None) -> tuple[list[Any], list[Any], Any, Any, Any]:
    """The scene's inputs, the merging's, the two buttons, and the line that says what happens."""
    with gr.Row():
        prompt = gr.Textbox(
            PROMPT, label="Prompt", max_length=1000, scale=4, min_width=240, elem_id="prompt"
        )
        run = gr.Button("Draw", variant="primary", min_width=90, elem_id="draw")
        stop = gr.Button("Stop", min_width=90, interactive=False, elem_id="stop")
    with gr.Row():
        ratio = gr.Slider(
            0,
            0.75,
            0.5,
            step=0.05,
            label="Ratio",
            info="Share of tokens to merge",
            elem_id="ratio",
        )
        since = gr.Slider(
            0,
            0.9,
            0,
            step=0.1,
            label="Since",
            info="Share of steps without merging",
            elem_id="since",
        )
        levels = gr.Dropdown(LEVELS, value=0, label="Levels", info="Levels of a UNet that merge")
        preset = gr.Dropdown(
            [("none", ""), *((name, name) for name in sorted(PRESETS))],
            value="",
            label="Preset",
            info="What merges in a block",
        )
    with gr.Accordion("Model, method, seed and steps", open=False), gr.Row():
        name = gr.Dropdown(
            [*available(), *MODELS] if model is None else [model],
            value=model or DEFAULT,
            allow_custom_value=model is None,
            label="Model",
            info="Embedded, or type a folder or a hub id",
            elem_id="model",
        )
        method = gr.Dropdown(list(METHODS), label="Method", info="Merge, or drop random tokens")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32)
        steps = gr.Number(
            0,
            label="Steps",
            info="0: the model's own",
            precision=0,
            minimum=0,
            maximum=200,
            elem_id="steps",
        )
    status = gr.Markdown(elem_id="status")
    return [prompt, name, seed, steps], [ratio, levels, since, preset, method], run, stop, status


def _images(
    play: Playground,
    scene: list[Any],
    merging: list[Any],
    run: Any,
    stop: Any,
    status: Any,
    result: Any,
) -> None:
    look: dict[str, Any] = {
        "interactive": False,
        "buttons": ["download", "fullscreen"],
        "height": 300,
        "min_width": 220,
        "elem_classes": "drawn",
    }
    with gr.Row():
        plain = gr.Image(label="Unpatched", alt_text="unpatched image", elem_id="unpatched", **look)
        merged = gr.Image(label="Merged", alt_text="merged image", elem_id="merged", **look)
        changed = gr.Image(
            label="Difference, 4 times", alt_text="difference", elem_id="difference", **look
        )
    with gr.Row():
        with gr.Column(min_width=280):
            figures = gr.Markdown(elem_id="figures")
            step = gr.Slider(1, 2, 1, step=1, label="Step", elem_id="map-step", interactive=False)
            block = gr.Slider(
                1, 2, 1, step=1, label="Block", elem_id="map-block", interactive=False
            )
            caption = gr.Markdown("Draw an image to see which tokens merged.", elem_id="caption")
        shown = gr.Image(
            label="Merged tokens",
            alt_text="merge map",
            elem_id="map",
            scale=2,
            **look | {"height": 420},
        )
    outputs = [plain, merged, changed, figures, result, step, block, status]
    for trigger in (run.click, scene[0].submit):
        started = trigger(
            handlers.busy, None, [run, stop, status], queue=False, api_visibility="private"
        )
        drawn = started.then(
            play.draw,
            [*scene, *merging],
            outputs,
            show_progress_on=[plain, merged],
            api_visibility="private",
        )
        drawn.then(handlers.idle, None, [run, stop], queue=False, api_visibility="private").then(
            play.draw_map,
            [result, step, block],
            [shown, caption],
            api_visibility="private",
            show_progress="hidden",
        )
    stop.click(play.stop, None, status, queue=False, api_visibility="private")
    for slider in (step, block):
        slider.change(
            play.draw_map,
            [result, step, block],
            [shown, caption],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )


def _frontier(play: Playground, scene: list[Any]) -> None:
    gr.Markdown(
        "Draws the current prompt with several settings. Points further right are faster, higher "
        "ones closer to the unpatched image. Small images, such as the embedded pipeline's, save "
        "little time, and one run each shows only large differences."
    )
    with gr.Row():
        run = gr.Button("Draw the curve", variant="primary", elem_id="curve")
        stop = gr.Button("Stop", interactive=False, elem_id="curve-stop")
    status = gr.Markdown(elem_id="frontier-status")
    plot = gr.ScatterPlot(
        x=handlers.SPEED,
        y=handlers.PSNR,
        color=handlers.SETTING,
        height=360,
        elem_id="plot",
        tooltip="all",
    )
    table = gr.Dataframe(
        headers=handlers.COLUMNS, interactive=False, label="Figures", elem_id="table"
    )
    started = run.click(
        handlers.busy, None, [run, stop, status], queue=False, api_visibility="private"
    )
    drawn = started.then(play.sweep, scene, [plot, table, status], api_visibility="private")
    drawn.then(handlers.idle, None, [run, stop], queue=False, api_visibility="private")
    stop.click(play.stop, None, status, queue=False, api_visibility="private")


def _classifier(play: Playground, tab: gr.Tab) -> None:
    gr.Markdown(
        "The embedded Vision Transformer names the shape in an image. Patches that share a color "
        "and a border have merged into one token."
    )
    with gr.Row():
        with gr.Column(min_width=240):
            picture = gr.Image(
                type="filepath",
                sources=["upload", "clipboard"],
                label="Image: PNG, JPEG or WebP",
                height=260,
                elem_id="upload",
            )
            seed = gr.Slider(0, 99, 3, step=1, label="Or a drawn image", elem_id="example")
            r = gr.Slider(
                0, MOST_R, 8, step=1, label="r", info="Tokens merged in each layer", elem_id="r"
            )
            layer = gr.Slider(1, LAYERS, LAYERS, step=1, label="After layer", elem_id="layer")
        with gr.Column(min_width=240):
            groups = gr.Image(
                label="Patches",
                alt_text="merged patches",
                interactive=False,
                height=400,
                elem_id="patches",
                buttons=["download", "fullscreen"],
            )
            reading = gr.Markdown(elem_id="reading")
    inputs, outputs = [picture, seed, r, layer], [groups, reading]
    # The classifier is loaded when its tab is first opened.
    for changed in (tab.select, *(control.change for control in inputs)):
        changed(
            play.read,
            inputs,
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_id="reading",
            api_visibility="private",
        )
