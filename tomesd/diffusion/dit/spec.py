"""What `tomesd.register` needs to know of a diffusion transformer."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from tomesd.diffusion.block import Grid
from tomesd.diffusion.settings import DiffusionSettings
from tomesd.registry import Spec

# The model and the arguments of its forward by name → the grids of its image tokens.
Grids = Callable[[Any, dict[str, Any]], tuple[Grid, ...]]


class Text(NamedTuple):
    """Text tokens that image tokens attend to in self-attention; they never merge.

    argument: the block's argument that holds them; "" if they are in the one with the image tokens.
    first: whether they come before the image tokens among the keys, and in that argument.
    last_with: a mask among the block's arguments; where there is one, they come after anyway.
    """

    argument: str = ""
    first: bool = True
    last_with: str = ""


class Rotary(NamedTuple):
    """Rotary position tables of the tokens; a merged token takes the angles of its destination.

    argument: the block's argument that holds the table, or a tuple or dict of tables.
    dim: the dimension of tokens. 0 means one table for all samples, hence one token map for all;
        -1 whichever of 1 and 2 has several entries, where releases of the host differ.
    table: which table or tuple of them, if only one of those in the argument is of image tokens.
    """

    argument: str
    dim: int = 0
    table: int | None = None


class Bias(NamedTuple):
    """Proportional attention through a mask that is added to the logits.

    ndim: its dimensions. argument: of the attention.
    """

    ndim: int
    argument: str = "attention_mask"


class UnmergeKeys(NamedTuple):
    """Proportional attention without a mask: these projections of keys and values are unmerged.

    Merged queries attend to the key of every token: exact, at half the saving.
    """

    projections: tuple[str, ...] = ("to_k", "to_v")


def _always_merges(given: dict[str, Any], settings: DiffusionSettings) -> str:
    """Patched models are pickled with their blocks' records, which lambdas cannot be."""
    return ""


class Override(NamedTuple):
    """Proportional attention where attention functions let themselves be replaced, as ComfyUI's do.

    argument: of the attention, or of the block if it names none: the options that are asked for a
        replacement.
    """

    argument: str = "transformer_options"


@dataclass(frozen=True)
class Blocks:
    """How the blocks in one list of a model take their tokens. Each is a residual of its input.

    >>> Blocks("blocks", attention=("attn1",), proportional=Bias(4), rotary=Rotary("rotary_emb"))
    Blocks(name='blocks', images=(0, None), tokens='hidden_states', ...

    name: of the list in the model, with dots if it is in a child.
    images: from which to which of the model's grids its tokens have, if not those of all images.
    tokens: the argument with the tokens that merge, [batch, tokens, channels].
    batch_first: whether they are so in the block, and not [tokens, batch, channels].
    text: the text tokens that they attend to together with their own, if any.
    output: the index of the image tokens in the block's output; None if they are all of it.
    attention: the block's children that do self-attention, with dots if they are deeper; some
        blocks may have None there. Empty if the block does it itself.
    proportional: how attention can weigh keys by size; None: merge without proportional attention.
    rotary: the rotary tables of the tokens, if any.
    per_token: arguments, tensors or lists of them, that may have an entry for each image token, and
        in which dimension; merged tokens take the entry of their destination. Dimension 0 is for
        entries that are the same for all tokens of a sample, or for models with one map for all.
    adds_first, adds_last: arguments with an entry for each token, which the block adds to its
        tokens before and after everything else: to all of them, merged or not.
    mask: the argument that may hold a mask of all keys, in its last dimension, or of all pairs.
    padded: whether padding may follow the image tokens, which never merges.
    first_image: the argument that may hold the number of tokens of the first grid, where the block
        does something else from there on.
    adds_in_place: whether the block may change the tokens that it is given.
    names: of the block's arguments in order, if its forward does not name them.
    why_not: from the block's arguments and the settings, why it does not merge this time; "" if it
        does.
    only: the class of the blocks that merge, if the list has others that should not.
    unless: a child module; blocks that have it do not merge, since they are no residual.
    carrier: the dict or tuple among the block's arguments in which the token grid travels; ""
        without one (see `DiT`).
    """

    name: str = "transformer_blocks"
    images: tuple[int, int | None] = (0, None)
    tokens: str = "hidden_states"
    batch_first: bool = True
    text: Text | None = None
    output: int | None = None
    attention: tuple[str, ...] = ("attn",)
    proportional: Bias | UnmergeKeys | Override | None = None
    rotary: Rotary | None = None
    per_token: tuple[tuple[str, int], ...] = ()
    adds_first: str = ""
    adds_last: str = ""
    mask: str = ""
    padded: bool = False
    first_image: str = ""
    adds_in_place: bool = False
    names: tuple[str, ...] = ()
    why_not: Callable[[dict[str, Any], DiffusionSettings], str] = _always_merges
    only: str = ""
    unless: str = ""
    carrier: str = ""

    @property
    def can_unmerge_keys(self) -> bool:
        """Whether keys can be unmerged: rotary positions are of merged ones, and so is a bias for
        text tokens among them."""
        plain = self.rotary is None and self.text is None and not self.mask
        return isinstance(self.proportional, UnmergeKeys) or (
            isinstance(self.proportional, Bias) and plain
        )

    def split(self, model: Any) -> tuple[list[Any], list[Any]]:
        """The blocks that merge, and those that do not because of `unless`."""
        blocks = [
            block
            for block in attrgetter(self.name)(model)
            if self.only in ("", type(block).__name__)
        ]
        others = [block for block in blocks if getattr(block, self.unless, None) is not None]
        return [block for block in blocks if block not in others], others

    def own(self, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        """Those of the model's grids that its tokens have."""
        return grids[slice(*self.images)]

    def attentions(self, block: Any) -> list[Any]:
        """The self-attention modules of a block."""
        found = [attrgetter(name)(block) for name in self.attention]
        return [attention for attention in found if attention is not None]


@dataclass(frozen=True)
class DiT(Spec):
    """How the diffusion transformers of one class are hooked.

    >>> from tomesd.diffusion.dit import latent_grid
    >>> blocks = Blocks(attention=("attn1",), proportional=Bias(3))
    >>> spec = DiT(blocks, grids=latent_grid())
    >>> tomesd.register(spec, "my_package.MyTransformer2DModel")

    blocks: one record for each list of blocks.
    grids: the grids of the image tokens, from the model and the arguments of its forward by name
        (`tomesd.diffusion.dit.grids`). Exact, and without a host sync if possible.
    kwargs: the model's argument, a dict, that it hands to its blocks; or
    rope: its child that computes a tuple of rotary tables for them. The token grid travels in
        either, because gradient checkpointing calls a block again, with the same arguments, when
        other forward passes may have come in between. Without both, the last forward's grid counts.
    reads_data: whether `grids` reads the values of tensors, which a graph cannot.
    timestep: the model's argument with the timestep.
    unmerged: other lists of blocks, and why they do not merge: for reports.
    why_not: what in a model prevents merging, though others of its class merge; "" if nothing.
    """

    blocks: Blocks | tuple[Blocks, ...]
    grids: Grids
    kwargs: str = ""
    rope: str = ""
    reads_data: bool = False
    timestep: str = "timestep"
    unmerged: tuple[tuple[str, str], ...] = ()
    why_not: Callable[[Any], str] = lambda model: ""

    @property
    def lists(self) -> tuple[Blocks, ...]:
        return (self.blocks,) if isinstance(self.blocks, Blocks) else self.blocks
