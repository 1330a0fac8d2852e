"""Every recipe of the documentation runs, on tiny models in place of those of the hub."""

import functools
import inspect

import diffusers
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import tomesd
from tests.support.documents import DOCS, examples
from tests.support.tiny_model import TEXT_TOKENS
from tests.support.tiny_pipelines import build_pipeline, sd_components, sdxl_pipeline
from tests.support.tiny_transformers import TINY
from tests.support.tiny_unets import controlnet, sd_unet

RECIPES = sorted(page.stem for page in (DOCS / "recipes").glob("*.md") if page.stem != "README")
SIZE = 64


def _sd(kind, **more):
    parts = sd_components() | {"requires_safety_checker": False}
    return build_pipeline(kind, parts | more)


def _animatediff(motion_adapter, **more):
    parts = sd_components()
    names = inspect.signature(diffusers.AnimateDiffPipeline.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in names}
    return build_pipeline(diffusers.AnimateDiffPipeline, parts | {"motion_adapter": motion_adapter})


def _adapter():
    torch.manual_seed(0)
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )


def _transformer(kind, name: str, encoded, **config):
    """A pipeline of a transformer without text encoders and autoencoder: prompts are noise."""
    parts = dict.fromkeys(inspect.signature(kind.__init__).parameters)
    parts.pop("self")
    parts["transformer"] = TINY[name].build(**config)
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    for other in ("boundary_ratio", "expand_timesteps"):
        parts.pop(other, None)
    pipe = build_pipeline(kind, parts)
    pipe.encode_prompt = lambda *args, **kwargs: encoded(pipe.transformer.config)
    return pipe


def _text(width: int) -> torch.Tensor:
    return torch.randn(1, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(0))


def _flux(**more):
    def encoded(config):
        pooled = torch.zeros(1, config.pooled_projection_dim)
        return _text(config.joint_attention_dim), pooled, torch.zeros(TEXT_TOKENS, 3)

    return _transformer(diffusers.FluxPipeline, "FluxTransformer2DModel", encoded)


def _sd3(**more):
    def encoded(config):
        text = _text(config.joint_attention_dim)
        pooled = torch.zeros(1, config.pooled_projection_dim)
        return text, text, pooled, pooled

    return _transformer(diffusers.StableDiffusion3Pipeline, "SD3Transformer2DModel", encoded)


def _wan(**more):
    def encoded(config):
        return _text(config.text_dim), _text(config.text_dim)

    return _transformer(diffusers.WanPipeline, "WanTransformer3DModel", encoded)


def _qwen(**more):
    def encoded(config):
        return _text(config.joint_attention_dim), torch.ones(1, TEXT_TOKENS, dtype=torch.long)

    return _transformer(diffusers.QwenImagePipeline, "QwenImageTransformer2DModel", encoded)


MAKE = {
    "StableDiffusionXLPipeline": lambda **more: sdxl_pipeline(),
    "StableDiffusionPipeline": lambda **more: _sd(diffusers.StableDiffusionPipeline),
    "StableDiffusionControlNetPipeline": lambda **more: _sd(
        diffusers.StableDiffusionControlNetPipeline, **more
    ),
    "StableDiffusionInpaintPipeline": lambda **more: _sd(
        diffusers.StableDiffusionInpaintPipeline, unet=sd_unet(in_channels=9)
    ),
    "AnimateDiffPipeline": _animatediff,
    "MotionAdapter": lambda **more: _adapter(),
    "ControlNetModel": lambda **more: controlnet(sd_unet()),
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "WanPipeline": _wan,
    "QwenImagePipeline": _qwen,
}


@pytest.fixture
def hub(monkeypatch):
    """Tiny models instead of the hub's, called for few small pictures, as latents if they have no
    autoencoder."""
    made = []

    def from_pretrained(cls, name, dtype=None, **components):
        made.append(MAKE[cls.__name__](**components))
        return made[-1]

    for kind in (diffusers.DiffusionPipeline, diffusers.ModelMixin):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    def small(call):
        @functools.wraps(call)
        def run(self, *args, **given):
            names = inspect.signature(call).parameters
            given["num_inference_steps"] = min(given.get("num_inference_steps", 4), 4)
            if "height" in names:
                given |= {"height": SIZE, "width": SIZE}
            if "num_frames" in names:
                given["num_frames"] = 5
            if "image" in names and isinstance(given.get("image"), Image.Image):
                given["image"] = given["image"].resize((2 * SIZE, 2 * SIZE))
            if getattr(self, "vae", None) is None:
                given["output_type"] = "latent"
            return call(self, *args, **given)

        return run

    for kind in _pipelines():
        monkeypatch.setattr(kind, "__call__", small(kind.__call__))
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline,
        "load_lora_weights",
        lambda pipe, name: pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"])),
    )
    return made


def _pipelines():
    names = [name for name in MAKE if name.endswith("Pipeline")]
    return [getattr(diffusers, name) for name in (*names, "StableDiffusionImg2ImgPipeline")]


@pytest.mark.filterwarnings("ignore:nothing merges")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_merges(name, hub, monkeypatch):
    (source,) = examples(DOCS / "recipes" / f"{name}.md")
    # The sizes are those of tiny models.
    source = source.replace("min_tokens=9216", "min_tokens=100")
    source = source.replace('preset="fast"', 'preset="fast", only_where_it_pays=False')
    assert len(source.splitlines()) <= 22
    names = {}
    exec(compile(source, f"docs/recipes/{name}.md", "exec"), names)
    rows = [row for rows in tomesd.report(names["pipe"]).rows.values() for row in rows]
    assert any(row.merged < row.tokens for row in rows)
    tomesd.remove_patch(names["pipe"])


def test_the_list_of_recipes_is_complete():
    listed = (DOCS / "recipes" / "README.md").read_text()
    assert all(f"({name}.md)" in listed for name in RECIPES)
