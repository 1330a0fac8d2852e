"""Whether merging in a pipeline keeps what it promises."""

import traceback
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
    """What came of a pipeline.

    merged: the names of its parts that merge, if any. refusal: else why it is refused, at the call
    of apply_patch. fault: else what broke a promise.
    """

    merged: tuple[str, ...] = ()
    refusal: str = ""
    fault: str = ""


def verdict(name: str, family: Family) -> Verdict:
    """Try a pipeline at every size and with all settings."""
    pipe = build(name, family)
    try:
        tomesd.apply_patch(pipe)
    except (TypeError, ValueError) as error:
        return _refusal(pipe, str(error))
    tomesd.remove_patch(pipe)
    parts: set[str] = set()
    for size in family.pipelines[name].sizes or family.sizes:
        before, work = _recorded(pipe, name, family, size)
        assert before.isfinite().all(), f"{name} must be finite without a patch"
        for settings in SETTINGS:
            tomesd.apply_patch(pipe, **settings)
            try:
                fault = _tried(pipe, name, family, size, before, work)
            except Exception as error:
                fault = f"{type(error).__name__} in its call: {error}"
                if "/tomesd/" in traceback.extract_tb(error.__traceback__)[-1].filename:
                    fault = f"refused only when called: {error}"
            if fault:
                return Verdict(fault=f"{fault} ({settings or 'default settings'})")
            parts |= set(tomesd.report(pipe).rows)
        tomesd.remove_patch(pipe)
        if not torch.equal(call(pipe, name, family, size), before):
            return Verdict(fault="not undone bit for bit")
    return Verdict(fault="hooks are left") if _hooks(pipe) else Verdict(tuple(sorted(parts)))


def _tried(
    pipe: Any, name: str, family: Family, size: tuple[int, int], before: Tensor, work: int
) -> str:
    """What is wrong with the patched pipeline's output, if anything."""
    after, less = _recorded(pipe, name, family, size)
    if after.shape != before.shape:
        return f"its output is {tuple(after.shape)} instead of {tuple(before.shape)}"
    if not after.isfinite().all():
        return "its output is not finite"
    if torch.equal(after, before):
        return "merging changes nothing"
    if less >= work:
        return f"attention is not shorter: {less} logits, {work} before"
    for part, rows in tomesd.report(pipe).rows.items():
        if not any(row.merged < row.tokens for row in rows):
            return f"nothing merges in its {part}"
    return "" if torch.equal(call(pipe, name, family, size), after) else "two runs differ"


def _refusal(pipe: Any, message: str) -> Verdict:
    named = any(type(part).__name__ in message for part in (pipe, *_modules(pipe)))
    if not named or "r=" in message or len(message) > 500:
        return Verdict(fault=f"the refusal does not say why: {message[:200]}")
    return Verdict(fault="hooks are left") if _hooks(pipe) else Verdict(refusal=message)


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _hooks(pipe: Any) -> int:
    return sum(map(count_hooks, _modules(pipe)))


def _recorded(pipe: Any, name: str, family: Family, size: tuple[int, int]) -> tuple[Tensor, int]:
    """The output, and how many logits attention computed for each head."""
    with _Work() as work:
        output = call(pipe, name, family, size)
    return output, work.logits


class _Work(AttentionRecorder):
    """Counts logits, also of processors that compute them themselves."""

    logits = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs)
        if function is torch.baddbmm:
            self.logits += output.shape[-2] * output.shape[-1]
        while self.seen:
            queries, keys = self.seen.pop()
            self.logits += queries * keys
        return output
