"""The tables that scripts/benchmark.py prints."""

from collections.abc import Callable

from benchmarks.common.markdown import MISSING, spread
from benchmarks.speed.patch_cost import STEPS
from benchmarks.speed.setup import Setup, environment

Table = Callable[[list[dict]], str]


def headline(setup: Setup, timed: bool = True) -> str:
    """The model, its settings and the machine in one line."""
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
    """Seconds, speedup, share of the ideal's saving, and memory of each variant."""
    columns = ("variant", f"seconds per {unit}", "times as fast", "share of ideal", "peak memory")
    lines = ["{:>5} {:<24} {:>24} {:>19} {:>17} {:>24}".format("px", *columns)]
    for row in rows:
        name = row["variant"] + (", checkpoints" if row.get("checkpointing") else "")
        start = f"{row['size']:>5} {name:<24} "
        if "error" in row:
            lines.append(f"{start}failed: {row['error']}")
            continue
        memory = row["memory"]
        size = f"{_gib(memory['peak'])} ({_gib(memory['before'])} before)" if memory else MISSING
        note = "  merged nothing" if row.get("blocks_merged") == 0 else ""
        lines.append(
            f"{start}{spread(row.get('median_seconds'), 3):>24} "
            f"{spread(row.get('speedup'), 2):>19} "
            f"{spread(row.get('share_of_ideal'), 0, 100, '%'):>17} {size:>24}{note}"
        )
    return "\n".join(lines)


def cost_table(rows: list[dict]) -> str:
    """Milliseconds of each step of the patch at each level, and the share of the peer's time."""
    titles = ("tokens × channels", "blocks", "variant", *STEPS, "all, ms", "share of the peer's")
    shape = "{:>17} {:>6} {:<20} {:>20} {:>20} {:>20} {:>20} {:>19}"
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
    """Milliseconds of attention with each form of the bias, and relative to no bias."""
    shape = "{:>22} {:>8} {:<18} {:>24} {:>22}"
    lines = [shape.format("queries × keys", "channels", "log(size)", "ms", "relative to none")]
    for row in rows:
        where = f"{row['queries']} × {row['keys']}"
        times, relative = spread(row["median_seconds"], 2, 1000), spread(row["of_none"], 2)
        lines.append(shape.format(where, row["channels"], row["form"], times, relative))
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
