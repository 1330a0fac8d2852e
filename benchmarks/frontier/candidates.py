"""What the frontier compares: settings of this project, and what is only measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.frontier.matchers import (
    MATCHED_ON,
    GridSettings,
    KeptSettings,
    LateSettings,
    MatchedSettings,
    RunSettings,
    install,
)
from benchmarks.pictures.picture_set import UNPATCHED, Row
from tomesd.diffusion.settings import PRESETS, DiffusionSettings, diffusion_settings

PEER = "tomesd==0.1.3"


@dataclass(frozen=True)
class Candidate(Row):
    """One point of the frontier; method is its name.

    >>> Candidate("blocks 0.5", DiffusionSettings(ratio=0.5), "whole blocks").name
    'blocks 0.5'

    family: what it is drawn as, one of FAMILIES.
    """

    family: str = UNPATCHED

    @property
    def name(self) -> str:
        return self.method

    @property
    def is_peer(self) -> bool:
        return self.family == PEER

    @property
    def is_setting(self) -> bool:
        """Whether `apply_patch` can do it, alike in every step."""
        return type(self.settings) is DiffusionSettings and not self.is_peer

    @property
    def shipped_as(self) -> str:
        """What `apply_patch` calls these settings, where all levels pay: "default" or a preset."""
        for preset in (None, *PRESETS):
            chosen = diffusion_settings(0.5, preset, {})
            if self.is_setting and self.settings == replace(chosen, only_where_it_pays=False):
                return f"preset {preset}" if preset else "default"
        return ""

    @property
    def period(self) -> int:
        """After how many forwards all that they do has been done once."""
        return self.settings.steps if isinstance(self.settings, KeptSettings) else 1

    @property
    def timed(self) -> str:
        """The name of the candidate that is timed: the steps of a schedule that merge are its."""
        if not isinstance(self.settings, LateSettings):
            return self.name
        steady = self.settings.steady
        return next(each.name for each in CANDIDATES if each.settings == steady)

    def over_steps(self, unpatched: float, merged: float) -> float:
        """The mean over all steps of what is so much in a step without and with merging."""
        if isinstance(self.settings, LateSettings):
            return self.settings.over_steps(unpatched, merged)
        return merged

    @contextmanager
    def patched(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this candidate's merging; a peer's pipeline is patched already."""
        if self.settings is None or self.is_peer:
            yield pipe
            return
        patch = install(pipe.unet, self.settings, pipe)
        try:
            yield pipe
        finally:
            patch.remove()


# In the order of the table and of the picture's legend.
FAMILIES = (
    UNPATCHED,
    "self-attention",
    "no log size",
    "plain means",
    "keys and values",
    "groups looked for again",
    "whole blocks",
    "not in the first fifth of the steps",
    "every branch (the paper)",
    "keys and values of a grid",
    "a map kept over steps",
    "cheaper matching",
    "random pruning",
    PEER,
)


def _of(family: str, **settings: DiffusionSettings) -> list[Candidate]:
    return [Candidate(name, chosen, family) for name, chosen in settings.items()]


# Branch by branch, or keys and values alone, at the finest level; all is said that differs.
_ATTENTION: dict[str, Any] = {"merge_block": False}
_KEYS: dict[str, Any] = {"merge_block": False, "merge_queries": False}
_BLOCKS: dict[str, Any] = {"merge_block": True}
_BY_4X4: dict[str, Any] = {"ratio": 0.9375, "sx": 4, "sy": 4}

# Levels are counted from the finest one (max_downsample), so that they are the same in models of
# different sizes: 1 is 1,024 tokens in the embedded pipeline and 4,096 in Stable Diffusion 1.5 at
# 512 px; 2 adds 256 and 1,024 tokens (min_tokens=256 and 1024); 8 is everywhere.
# Drawn: destinations at random (use_rand). Late: the first fifth of the steps stays unpatched.
# Windows are in tokens: 32 is the whole grid of the embedded pipeline and a quarter of the other's,
# so that 16 does to its pictures what 32 does to the other's.
CANDIDATES: list[Candidate] = [
    Candidate(UNPATCHED),
    *_of(
        "self-attention",
        **{
            "attention 0.3": DiffusionSettings(ratio=0.3, **_ATTENTION),
            "attention 0.5": DiffusionSettings(ratio=0.5, **_ATTENTION),
            "attention 0.3, two levels": DiffusionSettings(
                ratio=0.3, max_downsample=2, **_ATTENTION
            ),
            "attention 0.5, two levels": DiffusionSettings(
                ratio=0.5, max_downsample=2, **_ATTENTION
            ),
            "attention 0.5, drawn": DiffusionSettings(ratio=0.5, use_rand=True, **_ATTENTION),
            "attention 0.5, no windows": DiffusionSettings(ratio=0.5, window=0, **_ATTENTION),
            "attention 0.5, windows of 16": DiffusionSettings(ratio=0.5, window=16, **_ATTENTION),
            "attention 0.5, windows of 8": DiffusionSettings(ratio=0.5, window=8, **_ATTENTION),
        },
    ),
    *_of(
        "no log size",
        **{
            "attention 0.3, no log size": DiffusionSettings(
                ratio=0.3, prop_attn=False, **_ATTENTION
            ),
            "attention 0.5, no log size": DiffusionSettings(
                ratio=0.5, prop_attn=False, **_ATTENTION
            ),
            "blocks 0.5, no log size": DiffusionSettings(ratio=0.5, prop_attn=False, **_BLOCKS),
        },
    ),
    *_of(
        "plain means",
        **{
            "attention 0.5, plain means": DiffusionSettings(
                ratio=0.5, keep_norm=False, **_ATTENTION
            ),
            "keys 0.5, plain means": DiffusionSettings(ratio=0.5, keep_norm=False, **_KEYS),
            "keys 0.75, plain means": DiffusionSettings(ratio=0.75, keep_norm=False, **_KEYS),
            "keys 0.9375, plain means": DiffusionSettings(keep_norm=False, **_BY_4X4, **_KEYS),
        },
    ),
    *_of(
        "keys and values",
        **{
            "keys 0.5": DiffusionSettings(ratio=0.5, **_KEYS),
            "keys 0.75": DiffusionSettings(ratio=0.75, **_KEYS),
            "keys 0.9375": DiffusionSettings(**_BY_4X4, **_KEYS),
            "keys 0.75, two levels": DiffusionSettings(ratio=0.75, max_downsample=2, **_KEYS),
            "keys 0.9375, two levels": DiffusionSettings(max_downsample=2, **_BY_4X4, **_KEYS),
        },
    ),
    *_of(
        "groups looked for again",
        **{
            f"keys {ratio:g}, refined": DiffusionSettings(ratio=ratio, refine=1, **_KEYS)
            for ratio in (0.5, 0.75)
        },
        **{
            "keys 0.9375, refined": DiffusionSettings(refine=1, **_BY_4X4, **_KEYS),
            "keys 0.9375, refined twice": DiffusionSettings(refine=2, **_BY_4X4, **_KEYS),
            "keys 0.9375, refined twice, drawn": DiffusionSettings(
                refine=2, use_rand=True, **_BY_4X4, **_KEYS
            ),
            "attention 0.5, refined": DiffusionSettings(ratio=0.5, refine=1, **_ATTENTION),
            "attention 0.5, refined, drawn": DiffusionSettings(
                ratio=0.5, refine=1, use_rand=True, **_ATTENTION
            ),
            "blocks 0.5, refined": DiffusionSettings(ratio=0.5, refine=1, **_BLOCKS),
            "blocks 0.75, refined": DiffusionSettings(ratio=0.75, refine=1, **_BLOCKS),
        },
    ),
    *_of(
        "whole blocks",
        **{
            f"blocks {ratio:g}{where}": DiffusionSettings(
                ratio=ratio, max_downsample=coarsest, **_BLOCKS
            )
            for ratio in (0.25, 0.5)
            for coarsest, where in ((1, ""), (2, ", two levels"), (8, ", all levels"))
        },
        **{
            f"blocks 0.5, windows of {window}": DiffusionSettings(
                ratio=0.5, window=window, **_BLOCKS
            )
            for window in (16, 8)
        },
        **{"blocks 0.75": DiffusionSettings(ratio=0.75, **_BLOCKS)},
        **{
            f"blocks {ratio:g}, drawn": DiffusionSettings(ratio=ratio, use_rand=True, **_BLOCKS)
            for ratio in (0.25, 0.5)
        },
    ),
    *_of(
        "not in the first fifth of the steps",
        **{
            "keys 0.9375, late": LateSettings(**_BY_4X4, **_KEYS),
            "blocks 0.5, late": LateSettings(ratio=0.5, **_BLOCKS),
            "blocks 0.5, two levels, late": LateSettings(ratio=0.5, max_downsample=2, **_BLOCKS),
            "blocks 0.5, all levels, late": LateSettings(ratio=0.5, max_downsample=8, **_BLOCKS),
            "blocks 0.75, late": LateSettings(ratio=0.75, **_BLOCKS),
        },
    ),
    *_of("every branch (the paper)", **{"paper 0.5": diffusion_settings(0.5, "paper", {})}),
    *_of(
        "keys and values of a grid",
        **{
            "grid 2x2": GridSettings(ratio=0.75, **_KEYS),
            "grid 4x4": GridSettings(**_BY_4X4, **_KEYS),
            "grid 2x2, means": GridSettings(ratio=0.75, pools=True, **_KEYS),
            "grid 4x4, means": GridSettings(pools=True, **_BY_4X4, **_KEYS),
        },
    ),
    *_of(
        "a map kept over steps",
        **{
            f"{what} 0.5 kept {steps} steps": KeptSettings(ratio=0.5, steps=steps, **merging)
            for what, merging in (("attention", _ATTENTION), ("blocks", _BLOCKS))
            for steps in (2, 4)
        },
    ),
    *_of(
        "cheaper matching",
        **{
            f"blocks 0.5, matched on {what}": MatchedSettings(ratio=0.5, on=what, **_BLOCKS)
            for what in MATCHED_ON
        },
        # Of use where transformers have several blocks, as in SDXL (--speed-model sdxl).
        **{
            "blocks 0.5, all levels, a map for a run": RunSettings(
                ratio=0.5, max_downsample=8, **_BLOCKS
            )
        },
    ),
    *_of(
        "random pruning",
        **{
            "pruning 0.1": DiffusionSettings(ratio=0.1, method="prune", **_ATTENTION),
            "pruning 0.5": DiffusionSettings(ratio=0.5, method="prune", **_ATTENTION),
            "pruning of blocks 0.5": DiffusionSettings(ratio=0.5, method="prune", **_BLOCKS),
        },
    ),
    # As it is after installation: destinations at random.
    *_of(
        PEER,
        **{
            f"{PEER} {ratio:g}": DiffusionSettings(ratio=ratio, use_rand=True, **_ATTENTION)
            for ratio in (0.3, 0.5)
        },
    ),
]


def chosen(names: list[str] | None, with_peer: bool) -> list[Candidate]:
    """The candidates with these names, or all; the unpatched model is always the first, and a
    schedule brings the candidate that is timed for it.

    >>> [candidate.name for candidate in chosen(["keys 0.5"], with_peer=False)]
    ['unpatched', 'keys 0.5']

    Raises ValueError for a name that none has.
    """
    known = [each for each in CANDIDATES if with_peer or not each.is_peer]
    for name in names or ():
        if name not in [each.name for each in known]:
            allowed = "; ".join(each.name for each in known)
            raise ValueError(f"only must be among: {allowed}; got {name!r}")
    if not names:
        return known
    wanted = {UNPATCHED, *names, *(each.timed for each in known if each.name in names)}
    return [each for each in known if each.name in wanted]
