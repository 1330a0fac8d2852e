"""The work of `tomesd report`: a pipeline's denoisers without weights, and where merging pays."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tomesd
from tomesd.core.cost import Balance
from tomesd.diffusion.dit import DiTPatch
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.diffusion.unet import UNetPatch
from tomesd.hooks import PATCH
from tomesd.pictures.sampling import check_model, embedded_folder

BATCH = 2
_DEVICES = {"cpu": "one CPU thread", "cuda": "a GPU like an RTX 4090"}


@dataclass(frozen=True)
class Denoiser:
    """A denoiser without weights, and how many pixels a latent has along a side.

    why_not: why it does not merge; empty if it does.
    """

    model: Any
    scale: int
    why_not: str = ""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """1, 1.5 and 2 times the size that the model was made for; 512 px if it does not say."""
        size = self.model.config.get("sample_size")
        side = self.scale * size if isinstance(size, int) else 512
        return [(side * half // 2, side * half // 2) for half in (2, 3, 4)]


class Row(NamedTuple):
    """One place of a denoiser at one size."""

    where: str
    blocks: int
    tokens: int
    merged: int
    balance: Balance
    note: str = ""


def denoisers(model: str | None) -> dict[str, Denoiser]:
    """The denoisers of a pipeline, from its configuration alone.

    >>> list(denoisers(None))
    ['unet']

    Raises ValueError if it has none, or for what is no pipeline, and OSError if it cannot be read.
    """
    check_model(model)
    folder = _folder(model)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scale = _scale(folder)
    found = {
        name: _denoiser(folder, name, entry[1], scale)
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] == "diffusers" and _is_denoiser(entry[1])
    }
    if not found:
        raise ValueError(f"model must have a denoiser, got {index.get('_class_name')} without one")
    return found


def _folder(model: str | None) -> Path:
    folder = embedded_folder(model)
    if folder is not None:
        return folder
    assert model is not None
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/config.json"]
    return Path(snapshot_download(model, allow_patterns=patterns))


def _scale(folder: Path) -> int:
    """Pixels of a latent along a side; 8 if the autoencoder does not say."""
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    widths = config.get("block_out_channels")
    return 2 ** (len(widths) - 1) if widths else 8


def _is_denoiser(name: str) -> bool:
    kinds = ("UNet", "Transformer", "ControlNet")
    return any(kind in name for kind in kinds) and "Autoencoder" not in name


def _denoiser(folder: Path, part: str, name: str, scale: int) -> Denoiser:
    import diffusers

    kind = getattr(diffusers, name)
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder, subfolder=part))
    try:
        tomesd.apply_patch(model)
    except (TypeError, ValueError) as error:
        return Denoiser(model, scale, str(error))
    return Denoiser(model, scale)


def size_table(
    name: str,
    denoiser: Denoiser,
    settings: DiffusionSettings,
    sizes: Sequence[tuple[int, int]],
    device_kind: str,
) -> str:
    """What merges in a denoiser at each size, and the estimate of what it saves.

    >>> unet = denoisers(None)["unet"]
    >>> table = size_table("unet", unet, DiffusionSettings(), [(512, 512)], "cpu")
    >>> table.partition(",")[0]
    'unet: UNet2DConditionModel'
    """
    title = f"{name}: {type(denoiser.model).__name__}"
    if denoiser.why_not:
        return f"{title}, which does not merge: {denoiser.why_not}"
    options = {field.name: getattr(settings, field.name) for field in fields(settings)}
    try:
        tomesd.apply_patch(denoiser.model, **options)
    except (TypeError, ValueError) as error:
        return f"{title}, which does not merge so: {error}"
    lines = [
        f"{title}, estimated milliseconds of a forward on {_DEVICES[device_kind]}",
        f"  {'size':<10} {'where':<26} {'blocks':>6} {'tokens':>7} {'merged to':>9} "
        f"{'saves':>9} {'costs':>7}",
    ]
    for width, height in sizes:
        for row in _rows(denoiser, width, height, device_kind):
            size = f"{width}x{height}"
            line = f"  {size:<10} {row.where:<26} {row.blocks:>6} {row.tokens:>7} {row.merged:>9} "
            saved, spent = (1000 * row.blocks * each for each in row.balance)
            verdict = "pays" if row.balance.pays else "does not pay"
            figures = f"{saved:>9.1f} {spent:>7.1f}  {verdict}"
            lines.append(line + (f"{'':>17}  {row.note}" if row.note else figures))
    return "\n".join(lines)


def _rows(denoiser: Denoiser, width: int, height: int, device_kind: str) -> list[Row]:
    patch = getattr(denoiser.model, PATCH)
    size = -(-height // denoiser.scale), -(-width // denoiser.scale)
    each = _unet_rows if isinstance(patch, UNetPatch) else _dit_rows
    merged: dict[tuple[str, str], Row] = {}
    for row in each(patch, *size, device_kind):
        same = merged.get((row.where, row.note))
        merged[row.where, row.note] = row._replace(blocks=row.blocks + (same.blocks if same else 0))
    return list(merged.values())


def _unet_rows(patch: UNetPatch, h: int, w: int, device_kind: str) -> Iterator[Row]:
    for found in patch.transformers:
        grid = -(-h // found.downsample), -(-w // found.downsample)
        found.last = BATCH, *grid, torch.device("cpu")
        blocks = len(getattr(found.module, "transformer_blocks", []))
        tokens = grid[0] * grid[1]
        # Blocks of one level do the same work.
        where, note = f"1/{found.downsample} of the resolution", found.why_not()
        if note:
            yield Row(where, blocks, tokens, tokens, Balance(0, 0), note)
            continue
        ratio = found.ratio.largest
        channels = found.module.inner_dim
        shape = (BATCH, *grid, channels)
        balance = patch.matcher.balance(
            ratio, device_kind, *shape, joint=False, fused=device_kind != "cpu"
        )
        merged = tokens - patch.matcher.merged(ratio, *grid)
        yield Row(where, blocks, tokens, merged, balance)


def _dit_rows(patch: DiTPatch, h: int, w: int, device_kind: str) -> Iterator[Row]:
    frames, height, width = _grid(patch, h, w)
    tokens = frames * height * width
    channels = _channels(patch.model.config)
    matcher = patch.matcher.frame
    for kind in patch.spec.lists:
        blocks = len(kind.split(patch.model)[0])
        joint = kind.text is not None
        shape = (BATCH, height, width, channels)
        ratio = patch.plan.of_level(1).largest
        note = matcher.why_not(ratio, torch.device("cpu"), *shape, joint=joint)
        if note:
            yield Row(kind.name, blocks, tokens, tokens, Balance(0, 0), note)
            continue
        merged = tokens - patch.matcher.merged(ratio, (frames, height, width))
        balance = matcher.balance(
            ratio, device_kind, *shape, joint=joint, fused=device_kind != "cpu"
        )
        yield Row(kind.name, blocks, tokens, merged, balance)


def _grid(patch: DiTPatch, h: int, w: int) -> tuple[int, int, int]:
    """Of one image, or one frame. A model that does not cut latents into patches itself is given
    patches of 2×2 by its pipeline."""
    latents = torch.empty(BATCH, 16, h, w, device="meta")
    try:
        (grid,) = patch.spec.grids(patch.model, {"hidden_states": latents})
    except (KeyError, AttributeError, TypeError, IndexError, ValueError):
        grid = (1, h // 2, w // 2)
    return grid


def _channels(config: Mapping[str, Any]) -> int:
    if heads := config.get("num_attention_heads"):
        return int(heads * config.get("attention_head_dim", 64))
    return int(config.get("hidden_size") or config.get("dim") or 0)
