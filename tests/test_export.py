"""Exported models compute what the patched model does, for other batches and other pictures."""

import io
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tomesd
from tests.support import tiny_transformers, tiny_unets, tiny_vits
from tests.support.slow import slow_but

BATCHES = (1, 3)


class Call(nn.Module):
    """A model that is called with tensors by position and gives one tensor."""

    def __init__(self, model: nn.Module, names: list[str], others: dict[str, Any]):
        super().__init__()
        self.model, self.names, self.others = model, names, others

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        out = self.model(**given, **self.others)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.stack(out) if isinstance(out, tuple | list) else out


def vit(name: str) -> tuple[Call, list[Tensor]]:
    tiny = tiny_vits.build(name)
    tomesd.apply_patch(tiny.model, r=[3, 0, 9])
    return Call(tiny.model, list(tiny.inputs), {}).eval(), list(tiny.inputs.values())


def denoiser(name: str) -> tuple[Call, list[Tensor]]:
    tiny = (tiny_unets.TINY | tiny_transformers.TINY)[name]
    model, inputs = tomesd.apply_patch(tiny.build()), tiny.inputs(2)
    batched = [
        key
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() and len(value) == 2
    ]
    others = {key: value for key, value in inputs.items() if key not in batched}
    call = Call(model, batched, others | {"return_dict": False})
    return call.eval(), [inputs[key] for key in batched]


def model_of(name: str) -> tuple[Call, list[Tensor]]:
    return vit(name) if name in tiny_vits.FAMILIES else denoiser(name)


def resized(example: Tensor, batch: int) -> Tensor:
    """Another input of this batch; masks and sizes are the same for all samples."""
    if not example.is_floating_point() or len(example.unique()) < 3:
        return example[:1].expand(batch, *example.shape[1:]).contiguous()
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *example.shape[1:], generator=generator)


def check(run: Any, model: Call, inputs: list[Tensor], tolerance: float) -> None:
    for batch in BATCHES:
        other = [resized(each, batch) for each in inputs]
        torch.testing.assert_close(run(*other), model(*other), atol=tolerance, rtol=tolerance)


def traced(model: Call, inputs: list[Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(model, tuple(inputs), check_trace=False)


def dynamic(inputs: list[Tensor]) -> Any:
    return (tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs),)


def onnx(model: Call, inputs: list[Tensor], dynamo: bool) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, names = io.BytesIO(), [f"input{i}" for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(
                model, tuple(inputs), dynamo=True, dynamic_shapes=dynamic(inputs), verbose=False
            )
            program.save(file)
        else:
            axes = {name: {0: "batch"} for name in (*names, "output")}
            torch.onnx.export(
                model,
                tuple(inputs),
                file,
                dynamo=False,
                input_names=names,
                output_names=["output"],
                dynamic_axes=axes,
                opset_version=18,
            )
    session = runtime.InferenceSession(file.getvalue())
    wanted = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        given = zip(wanted, tensors, strict=True)
        return torch.tensor(session.run(None, {name: x.numpy() for name, x in given})[0])

    return run


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


DENOISERS = (
    *("UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"),
    *("WanTransformer3DModel", "QwenImageTransformer2DModel"),
)


# Pixtral's own forward, traced, takes as many pictures as its example.
VITS = tuple(name for name in tiny_vits.FAMILIES if name != "Pixtral")


@pytest.mark.parametrize("name", [*VITS, *DENOISERS, "FluxTransformer2DModel"])
@torch.no_grad()
def test_a_traced_model_takes_batches_of_any_size(name):
    model, inputs = model_of(name)
    check(traced(model, inputs), model, inputs, tolerance=1e-6)


@torch.no_grad()
def test_an_example_of_one_sample_does_not_fix_the_batch():
    model, inputs = vit("timm")
    check(traced(model, [inputs[0][:1]]), model, inputs, tolerance=1e-6)


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"timm"},
        ["timm", "ViT", "CLIP", "SigLIP 2", "torchvision", "VideoMAE", *DENOISERS],
    ),
)
@torch.no_grad()
def test_torch_export_takes_batches_of_any_size(name):
    model, inputs = model_of(name)
    program = torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic(inputs))
    check(program.module(), model, inputs, tolerance=1e-5)


@pytest.mark.parametrize("name", slow_but(set(), ["timm", "ViT", "UNet2DConditionModel"]))
@torch.no_grad()
def test_onnx_takes_batches_of_any_size(name):
    model, inputs = model_of(name)
    check(onnx(model, inputs, dynamo=True), model, inputs, tolerance=1e-3)


OLD = ("timm", "timm distilled", "ViT", "DINOv2", "CLIP", "SigLIP 2", "VideoMAE", "BLIP")
OLD += ("InternVL", "AST", "UNet2DConditionModel", "PixArtTransformer2DModel")
OLD += ("SD3Transformer2DModel",)


@pytest.mark.parametrize("name", slow_but({"timm", "ViT"}, OLD))
@torch.no_grad()
def test_the_older_onnx_exporter_takes_batches_of_any_size(name):
    model, inputs = model_of(name)
    check(onnx(model, inputs, dynamo=False), model, inputs, tolerance=1e-3)


@torch.no_grad()
def test_a_model_whose_grid_is_in_its_data_says_that_torch_export_cannot_read_it():
    model, inputs = denoiser("FluxTransformer2DModel")
    with pytest.raises(TypeError, match=r"torch.export cannot export a patched Flux"):
        torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic(inputs))


@torch.no_grad()
def test_exporting_leaves_the_model_as_it_was():
    model, inputs = vit("timm")
    before = model(*inputs)
    traced(model, inputs)
    torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic(inputs))
    assert torch.equal(model(*inputs), before)


SAMPLES = ("timm", "VideoMAE", "PixArtTransformer2DModel", "UNet2DConditionModel")
MORE = ("ViT", "torchvision", "UNetSpatioTemporalConditionModel", "UNet3DConditionModel")


@pytest.mark.parametrize("name", slow_but(SAMPLES, SAMPLES + MORE))
@torch.no_grad()
def test_vmap_gives_what_single_samples_give(name):
    model, inputs = model_of(name)
    expected = torch.cat([model(*(x[i : i + 1] for x in inputs)) for i in range(2)])
    got = vmap(lambda *sample: model(*(x[None] for x in sample))[0])(*inputs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", slow_but(SAMPLES, SAMPLES + MORE))
def test_gradients_of_each_sample_are_those_of_single_samples(name):
    model, inputs = model_of(name)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(model, parameters, tuple(x[None] for x in sample)).square().mean()

    each = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(parameters, *inputs)
    for i in range(2):
        alone = grad(loss)(parameters, *(x[i] for x in inputs))
        for key, value in alone.items():
            torch.testing.assert_close(each[key][i], value, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_positions_that_a_grid_is_read_from_cannot_be_mapped_over():
    model, inputs = denoiser("Flux2Transformer2DModel")
    with pytest.raises(TypeError, match=r"positions of a patched Flux2Transf.*in_dims=None"):
        vmap(lambda *sample: model(*(x[None] for x in sample))[0])(*inputs)
    ids = model.names.index("img_ids")
    dims = tuple(None if i == ids else 0 for i in range(len(inputs)))

    def call(*sample: Tensor) -> Tensor:
        return model(*(x if i == ids else x[None] for i, x in enumerate(sample)))[0]

    one = [x[:1] if i == ids else x for i, x in enumerate(inputs)]
    expected = torch.stack(
        [call(*(x if i == ids else x[b] for i, x in enumerate(one))) for b in (0, 1)]
    )
    torch.testing.assert_close(vmap(call, dims)(*one), expected, atol=1e-5, rtol=1e-5)
