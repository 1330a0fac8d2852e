"""The command of scripts/benchmark.py: options, checks, and the measurement that they choose."""

from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import Command, number
from benchmarks.common.files import check_file, write_json
from benchmarks.models import transformers
from benchmarks.models.transformers import Transformer
from benchmarks.models.unets import Denoiser
from benchmarks.peer.process import install_peer
from benchmarks.speed.attention_bias import measure_bias
from benchmarks.speed.forwards import measure_forwards, measure_memory
from benchmarks.speed.lora_training import check_peft, measure_training
from benchmarks.speed.patch_cost import measure_cost
from benchmarks.speed.setup import Setup, environment
from benchmarks.speed.tables import Table, bias_table, cost_table, forward_table, headline
from benchmarks.speed.variants import Variant, prepare
from tomesd.diffusion.settings import METHODS, PRESETS, DiffusionSettings, diffusion_settings
from tomesd.pictures.device import PRECISIONS, choose_device, choose_precision

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Fields of DiffusionSettings whose options are not made from them.
OWN_OPTIONS = {"ratio", "method"}


@dataclass(frozen=True)
class Job:
    """What to measure: the arguments, and everything that they select."""

    args: Namespace
    setup: Setup


def check(args: Namespace) -> Job:
    """Check all arguments, and that the models can be patched, before any work."""
    denoiser = transformers.denoiser(args.model, args.blocks)
    args.size = args.size or [denoiser.size]
    args.batch = args.batch or (1 if args.train_lora else denoiser.batch)
    check_sizes(args.size, denoiser)
    check_combination(args, denoiser)
    device = choose_device(args.device)
    if args.memory and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--memory is counted on cpu and cuda only, got the device {device.type}")
    if args.output:
        check_file(args.output)
    by_step = args.cost or args.bias
    variants = chosen_variants(args)
    for variant in variants:
        if variant.kind == "patched":
            prepare(denoiser.empty(), variant)
    setup = Setup(
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
    return Job(args, setup)


def chosen_variants(args: Namespace) -> list[Variant]:
    """Unpatched, each method at each ratio, the ideal and the peer, as far as they apply."""
    names = {field.name for field in fields(DiffusionSettings)} & vars(args).keys() - OWN_OPTIONS
    given = {name: getattr(args, name) for name in names}
    by_step = args.cost or args.bias
    variants = [] if by_step else [Variant("unpatched", "unpatched")]
    for ratio in dict.fromkeys(args.ratio):
        chosen = {
            method: diffusion_settings(ratio, args.preset, given | {"method": method})
            for method in dict.fromkeys(args.method)
        }
        if ratio <= 0:
            raise ValueError(f"--ratio must be above 0, got {ratio}: unpatched is always measured")
        for method, settings in chosen.items():
            variants.append(Variant(f"{method} {ratio:g}", "patched", settings))
        first = chosen[args.method[0]]
        if not (by_step or args.train_lora or args.memory):
            # All methods leave the same number of tokens: one ideal is the bound of them all.
            variants.append(Variant(f"ideal {ratio:g}", "ideal", first))
        if args.peer and not args.bias:
            variants.append(Variant(f"{args.peer} {ratio:g}", "peer", first))
    return variants


def check_sizes(sizes: list[int], denoiser: Denoiser) -> None:
    for size in sizes:
        if size < denoiser.pixels or size % denoiser.pixels:
            raise ValueError(f"--size must be a multiple of {denoiser.pixels}, got {size}")
        if denoiser.largest and size > denoiser.largest:
            raise ValueError(
                f"--size must be at most {denoiser.largest} for {denoiser.name}, got {size}"
            )


def check_combination(args: Namespace, denoiser: Denoiser) -> None:
    """Raises ValueError for options that exclude each other."""
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


def run(job: Job) -> None:
    """Measure size by size; each is printed and written when it is finished."""
    args, setup = job.args, job.setup
    print(headline(setup, timed=not args.memory))
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "command")}
    name, measured, table = measurement(args, setup)
    record: dict[str, Any] = {
        "command": args.command,
        "settings": settings,
        "environment": environment(setup),
        name: [],
    }
    for rows in measured:
        lines = table(rows)
        print(lines.partition("\n")[2] if record[name] else lines, flush=True)
        record[name] += rows
        if args.output:
            write_json(args.output, record)


def measurement(args: Namespace, setup: Setup) -> tuple[str, Iterator[list[dict]], Table]:
    """The measurement: its name in the JSON file, the rows of each size, and their table."""
    if args.cost:
        return "cost", measure_cost(setup), cost_table
    if args.bias:
        return "bias", measure_bias(setup), bias_table
    if args.train_lora:
        return "training", measure_training(setup), partial(forward_table, unit="step")
    if args.memory:
        return "memory", measure_memory(setup), forward_table
    return "forward", measure_forwards(setup), forward_table


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="sd15",
        help="sd15, sdxl, sd3, sd35, flux or a folder, its config only (sd15)",
    )
    add("--blocks", type=int, help="of a transformer, in each of its lists (2, Flux: 1)")
    add("--size", type=int, nargs="+", help="pixels, square (512, transformers: 1024)")
    add("--ratio", type=float, nargs="+", default=[0.5], help="(0.5)")
    add("--method", nargs="+", choices=METHODS, default=["tome"], help="(tome)")
    add(
        "--batch",
        type=number(int, 1, 1024),
        help="(2, one image with guidance; 1 for Flux and with --train-lora)",
    )
    add("--precision", choices=PRECISIONS, help="(cuda: bf16, or fp16 if too old; others: fp32)")
    add("--device", help="cuda, mps or cpu (the first available)")
    add(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        help="torch.compile every variant, in this mode (default); reduce-overhead: CUDA graphs",
    )
    add("--rounds", type=number(int, 1, 100_000), help="(5; with --cost or --bias 50)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cost", action="store_true", help="only match, merge and unmerge")
    only.add_argument("--bias", action="store_true", help="only attention, with and without bias")
    only.add_argument("--train-lora", action="store_true", help="training steps, not forwards")
    only.add_argument("--memory", action="store_true", help="only memory, no times")
    add("--no-memory", action="store_true", help="only time: fewer model loads")
    add("--peer", help="tomesd==<version>, installed from PyPI for comparison (none)")
    add("--peer-cache", type=Path, default=Path("runs/peers"), help="(%(default)s)")
    add("--output", type=Path, help="a JSON file with all settings and figures (none)")
    add_patch_options(parser)


def add_patch_options(parser: ArgumentParser) -> None:
    """An option for each setting of the patch that has none of its own."""
    group = parser.add_argument_group("the patch", "see tomesd.DiffusionSettings")
    group.add_argument("--preset", choices=sorted(PRESETS))
    for field in fields(DiffusionSettings):
        if field.name in OWN_OPTIONS:
            continue
        assert field.default is not MISSING
        kind = type(field.default)
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": BooleanOptionalAction}
        group.add_argument(f"--{field.name.replace('_', '-')}", default=SUPPRESS, **how)


main = Command("benchmark", add_options, check, run)
