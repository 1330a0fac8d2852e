"""Time and memory of token merging: python scripts/benchmark.py --model sd15 --size 512

Full-size denoisers with random weights, so nothing is downloaded; of SD3 and Flux a few blocks
(--blocks). In every round each variant runs one forward: unpatched, patched, the ideal (as many
tokens, chosen by a plain slice: no matching), and, if asked for, another release of tomesd. Ratios
are taken within a round. With --memory, no times. With --cost, the patch's own steps instead:
matching, merging and unmerging at each level of the model. With --bias, what proportional attention
costs inside of the attention kernel, in each form it can take. With --train-lora, steps of training
a LoRA adapter, without and with gradient checkpointing. Each size is printed, and written to
--output, once it is done; a row for which memory runs out says so, and all others are measured.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import number, run_script
from benchmarks.common.device import PRECISIONS, choose_device, choose_precision
from benchmarks.common.files import check_file, atomic_write
from benchmarks.speed import full_size_transformers, key_bias
from benchmarks.speed.forwards import (
    STEPS,
    Setup,
    environment,
    measure_cost,
    measure_forwards,
    measure_memory,
    ready,
)
from benchmarks.models.unets import Denoiser
from benchmarks.models.transformers import Transformer
from benchmarks.speed.lora_training import check_peft, measure_training
from benchmarks.peer.process import install_peer
from benchmarks.speed.variants import Variant
from tomesd.diffusion.settings import METHODS, PRESETS, DiffusionSettings, diffusion_settings

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        setup = check(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        parser.error(str(error))
    print(headline(setup, timed=not args.memory))
    record: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "environment": environment(setup),
    }
    name, measured, table = measurement(args, setup)
    record[name] = []
    for rows in measured:  # of one size after the other, so that none is lost with the next
        lines = table(rows)
        print(lines.partition("\n")[2] if record[name] else lines, flush=True)
        record[name] += rows
        if args.output:
            with atomic_write(args.output) as file:
                file.write_text(json.dumps(record, indent=1, default=str) + "\n")


def measurement(
    args: argparse.Namespace, setup: Setup
) -> tuple[str, Iterator[list[dict]], Callable[[list[dict]], str]]:
    """What was asked for: its name in the JSON file, its rows for each size, and their table."""
    if args.cost:
        return "cost", measure_cost(setup), cost_table
    if args.bias:
        return "bias", key_bias.measure(setup), bias_table
    if args.train_lora:
        return "training", measure_training(setup), partial(forward_table, unit="step")
    if args.memory:
        return "memory", measure_memory(setup), forward_table
    return "forward", measure_forwards(setup), forward_table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        default="sd15",
        help="sd15, sdxl, sd3, sd35, flux or a folder (its config only)",
    )
    parser.add_argument(
        "--blocks", type=int, help="of a transformer, in each of its lists; default: 2, for Flux 1"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", help="pixels, square; default: 512, for transformers 1024"
    )
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["tome"])
    parser.add_argument(
        "--batch",
        type=number(int, 1, 1024),
        help="default: 2, one picture with guidance; 1 for Flux and with --train-lora",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: bf16 or fp16 on cuda, fp32 elsewhere"
    )
    parser.add_argument("--device", help="default: cuda or mps if there is one, or cpu")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        help="torch.compile every variant, in this mode (default); reduce-overhead: CUDA graphs",
    )
    parser.add_argument(
        "--rounds", type=number(int, 1, 100_000), help="default: 5; 50 with --cost or --bias"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cost", action="store_true", help="only match, merge and unmerge")
    only.add_argument("--bias", action="store_true", help="only attention, with log(size) or not")
    only.add_argument("--train-lora", action="store_true", help="steps of training, not forwards")
    only.add_argument("--memory", action="store_true", help="only memory, no times")
    parser.add_argument("--no-memory", action="store_true", help="only time: fewer model loads")
    parser.add_argument("--peer", help="tomesd==<version>, installed from PyPI for comparison")
    parser.add_argument("--peer-cache", type=Path, default=Path("runs/peers"))
    parser.add_argument("--output", type=Path, help="a JSON file with all settings and figures")
    group = parser.add_argument_group("the patch", "see tomesd.DiffusionSettings")
    group.add_argument("--preset", choices=sorted(PRESETS))
    for field in fields(DiffusionSettings):
        if field.name in ("ratio", "method"):
            continue
        assert field.default is not MISSING
        kind = type(field.default)
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    return parser


def check(args: argparse.Namespace) -> Setup:
    """Everything that can be wrong is found here, before any work is done."""
    denoiser = full_size_transformers.denoiser(args.model, args.blocks)
    args.size = args.size or [denoiser.size]
    args.batch = args.batch or (1 if args.train_lora else denoiser.batch)
    check_sizes(args.size, denoiser)
    check_measurement(args, denoiser)
    device = choose_device(args.device)
    if args.memory and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--memory is counted on cpu and cuda only, got the device {device.type}")
    if args.output:
        check_file(args.output)
    named = {f.name for f in fields(DiffusionSettings)} & vars(args).keys() - {"ratio", "method"}
    given = {name: getattr(args, name) for name in named}
    settings = {
        (method, ratio): diffusion_settings(ratio, args.preset, given | {"method": method})
        for ratio in args.ratio
        for method in args.method
    }
    for ratio in args.ratio:
        if ratio <= 0:
            raise ValueError(f"--ratio must be above 0, got {ratio}: unpatched is always there")
    by_step = args.cost or args.bias
    variants = [] if by_step else [Variant("unpatched", "unpatched")]
    for ratio in dict.fromkeys(args.ratio):
        for method in dict.fromkeys(args.method):
            variants.append(Variant(f"{method} {ratio:g}", "patched", settings[method, ratio]))
        first = settings[args.method[0], ratio]
        if not (by_step or args.train_lora or args.memory):
            # All methods leave as many tokens: one ideal bounds them all.
            variants.append(Variant(f"ideal {ratio:g}", "ideal", first))
        if args.peer and not args.bias:
            variants.append(Variant(f"{args.peer} {ratio:g}", "peer", first))
    for variant in variants:
        if variant.kind == "patched":
            ready(denoiser.empty(), variant)
    return Setup(
        denoiser=denoiser,
        sizes=args.size,
        variants=variants,
        batch=args.batch,
        rounds=args.rounds or (50 if by_step else 5),
        device=device,
        precision=args.precision or choose_precision(device),
        compiled=args.compile,
        measures_memory=device.type in ("cpu", "cuda") and not (args.no_memory or by_step),
        peer=install_peer(args.peer, args.peer_cache) if args.peer else None,
        peer_name=args.peer or "",
    )


def check_sizes(sizes: list[int], denoiser: Denoiser) -> None:
    for size in sizes:
        if size < denoiser.pixels or size % denoiser.pixels:
            raise ValueError(f"--size must be a multiple of {denoiser.pixels}, got {size}")
        if denoiser.largest and size > denoiser.largest:
            raise ValueError(
                f"--size must be at most {denoiser.largest} for {denoiser.name}, got {size}"
            )


def check_measurement(args: argparse.Namespace, denoiser: Denoiser) -> None:
    """What cannot be measured together."""
    if args.memory and args.no_memory:
        raise ValueError("--no-memory must not be given with --memory: nothing would be measured")
    for name in ("cost", "bias"):
        if args.compile and getattr(args, name):
            raise ValueError(f"--compile must not be given with --{name}: its steps run eagerly")
    if isinstance(denoiser, Transformer):
        for name in ("bias", "peer"):
            if getattr(args, name):
                raise ValueError(f"--{name} must not be given for {denoiser.name}: it is for UNets")
    if args.train_lora:
        check_peft()
        for name in ("compile", "peer"):
            if getattr(args, name):
                raise ValueError(f"--{name} must not be given with --train-lora")


def headline(setup: Setup, timed: bool = True) -> str:
    about = environment(setup)
    where = about["accelerator"] or f"{about['cpu']}, {about['threads']} threads"
    how = f"compiled ({setup.compiled})" if setup.compiled else "eager"
    return (
        f"{setup.denoiser.name}, batch {setup.batch}, {setup.precision}, "
        f"{how}, on {setup.device} ({where}), "
        f"torch {about['torch_version']}"
        + (f", {setup.rounds} rounds; medians (quartiles)" if timed else "")
    )


def forward_table(rows: list[dict], unit: str = "forward") -> str:
    columns = ("variant", f"seconds per {unit}", "times as fast", "share of ideal", "peak memory")
    lines = ["{:>5} {:<24} {:>24} {:>19} {:>17} {:>24}".format("px", *columns)]
    for row in rows:
        name = row["variant"] + (", checkpoints" if row.get("checkpointing") else "")
        start = f"{row['size']:>5} {name:<24} "
        if "error" in row:
            lines.append(f"{start}failed: {row['error']}")
            continue
        memory = row["memory"]
        size = f"{gib(memory['peak'])} ({gib(memory['before'])} before)" if memory else "–"
        note = "  merged nothing" if row.get("blocks_merged") == 0 else ""
        lines.append(
            f"{start}{spread(row.get('median_seconds'), 3):>24} "
            f"{spread(row.get('speedup'), 2):>19} "
            f"{spread(row.get('share_of_ideal'), 0, 100, '%'):>17} {size:>24}{note}"
        )
    return "\n".join(lines)


def cost_table(rows: list[dict]) -> str:
    titles = ("tokens × channels", "blocks", "variant", *STEPS, "all, ms", "all, of the peer's")
    shape = "{:>17} {:>6} {:<20} {:>20} {:>20} {:>20} {:>20} {:>18}"
    lines = [shape.format(*titles)]
    for row in rows:
        where = f"{row['h'] * row['w']} × {row['channels']}"
        if "error" in row:
            lines.append(f"{where:>17} {row['blocks']:>6} {row['variant']:<20} {row['error']}")
            continue
        figures = [spread(row[step], 2, 1000) for step in (*STEPS, "all")]
        share = spread(row.get("share_of_peer"), 2)
        lines.append(shape.format(where, row["blocks"], row["variant"], *figures, share))
    return "\n".join(lines)


def bias_table(rows: list[dict]) -> str:
    shape = "{:>22} {:>8} {:<18} {:>24} {:>22}"
    lines = [shape.format("queries × keys", "channels", "log(size)", "ms", "of that without")]
    for row in rows:
        where = f"{row['queries']} × {row['keys']}"
        taken, share = spread(row["median_seconds"], 2, 1000), spread(row["of_none"], 2)
        lines.append(shape.format(where, row["channels"], row["form"], taken, share))
    return "\n".join(lines)


def spread(value: dict | None, digits: int, times: float = 1, unit: str = "") -> str:
    if value is None:
        return "–"
    median, low, high = (f"{times * value[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median}{unit} ({low}–{high})"


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_script(main)
