"""Whether merging in a pipeline keeps what it promises."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from tests.support.pipelines.build import Family, build, call
from tests.support.recorders import AttentionRecorder, count_hooks

# The settings that every pipeline is tried with.
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"max_downsample": 8})


@dataclass(frozen=True)
class Verdict:
    """merged: the names of the parts that merge, if any; else why the pipeline is refused."""

    merged: tuple[str, ...] = ()
    refusal: str = ""


def verdict(name: str, family: Family) -> Verdict:
    """Try a pipeline at every size and with all settings; raises AssertionError for a fault."""
    pipe = build(name, family)
    try:
        tomesd.apply_patch(pipe)
    except (TypeError, ValueError) as error:
        return Verdict(refusal=str(error))
    tomesd.remove_patch(pipe)
    parts: set[str] = set()
    for size in family.sizes:
        before, work = _recorded(pipe, name, family, size)
        assert before.isfinite().all(), "not finite without a patch"
        for settings in SETTINGS:
            tomesd.apply_patch(pipe, **settings)
            after, less = _recorded(pipe, name, family, size)
            assert after.shape == before.shape, f"{after.shape} instead of {before.shape}"
            assert after.isfinite().all(), f"not finite with {settings}"
            assert less < work, f"attention is not shorter with {settings} at {size}"
            assert not torch.equal(after, before), f"merging changes nothing with {settings}"
            rows = tomesd.report(pipe).rows
            for part, own in rows.items():
                assert any(row.merged < row.tokens for row in own), f"{part} does not merge"
            parts |= set(rows)
            if not settings:
                again = call(pipe, name, family, size)
                assert torch.equal(again, after), "two runs differ"
        tomesd.remove_patch(pipe)
        undone = call(pipe, name, family, size)
        assert torch.equal(undone, before), "not undone bit for bit"
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert not any(map(count_hooks, modules)), "hooks are left"
    return Verdict(merged=tuple(sorted(parts)))


def _recorded(pipe: Any, name: str, family: Family, size: tuple[int, int]) -> tuple[Tensor, int]:
    """The output, and how many pairs of queries and keys attention computed."""
    with _Work() as work:
        output = call(pipe, name, family, size)
    return output, work.pairs


class _Work(AttentionRecorder):
    """Counts logits, also of processors that compute them themselves."""

    pairs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs)
        if function is torch.baddbmm:
            self.pairs += output.shape[-2] * output.shape[-1]
        elif function is nn.functional.scaled_dot_product_attention:
            queries, keys = self.seen.pop()
            self.pairs += queries * keys
        return output
