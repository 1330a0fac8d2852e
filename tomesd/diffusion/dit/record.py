"""What a family of diffusers' transformers says of itself, so that it can be hooked."""

from collections.abc import Callable
from typing import Any, NamedTuple

# Frames, height and width of the tokens of one picture or video; several may follow one another.
Grid = tuple[int, int, int]


class Blocks(NamedTuple):
    """How the blocks in one list of a model take their tokens.

    >>> Blocks("single_transformer_blocks", carrier="joint_attention_kwargs", bias=4)
    Blocks(where='single_transformer_blocks', carrier='joint_attention_kwargs', ...

    where: the list's name in the model. of: the class of these blocks, where there may be others.
    tokens: the argument with the tokens that merge.
    text: the argument with text tokens that are among the keys too; "" where there are none.
    together: whether text tokens are in the same argument as the image's. They are protected.
    image_first: whether the image tokens come before the text's, in either case, or after them.
    output: where the image tokens are in the block's output; None where they are all of it.
    attention: the block's children that do self-attention; some blocks may have None there.
    bias: how many dimensions their attention_mask has, for proportional attention; 0 where they
        have no use for one. keys: then, their projections of keys and values, which are unmerged:
        a key that is there once for each of its tokens weighs as much as they did, and merged
        queries attend to all of them. Without both there is no proportional attention.
    rotary: the argument with the tokens' rotary tables. rotary_dim: their dimension of tokens;
        0 means that they are the same for all samples, and so is then the token map.
        rotary_at: which of the argument's tables are of image tokens; None where all are.
    per_token: arguments that may hold something for each image token, and in which dimension; that
        of its head is kept.
    mask: the argument that may hold a mask of the keys, all of them, in its last dimension.
    unless: a child that blocks may have; those that do are left alone, because what they compute is
        no residual of what they are given.
    carrier: the dict or tuple among the arguments in which the token grid travels; "" where the
        block has none (see `Family`).
    """

    where: str = "transformer_blocks"
    of: str = ""
    tokens: str = "hidden_states"
    text: str = ""
    together: bool = False
    image_first: bool = False
    output: int | None = None
    attention: tuple[str, ...] = ("attn",)
    bias: int = 0
    keys: tuple[str, ...] = ()
    rotary: str = ""
    rotary_dim: int = 0
    rotary_at: int | None = None
    per_token: tuple[tuple[str, int], ...] = ()
    mask: str = ""
    unless: str = ""
    carrier: str = ""

    def split(self, model: Any) -> tuple[list[Any], list[Any]]:
        """The blocks that merge, and those that are left alone."""
        blocks = [
            block for block in getattr(model, self.where) if self.of in ("", type(block).__name__)
        ]
        alone = [block for block in blocks if getattr(block, self.unless, None) is not None]
        return [block for block in blocks if block not in alone], alone


class Family(NamedTuple):
    """How models of some classes are hooked.

    models: the names of the classes. blocks: their lists of blocks.
    grids: the grids of the image tokens, from the model and its arguments by name. Exact, and
        without looking at the data where that can be.
    kwargs: the model's argument, a dict, that it hands on to its blocks; or
    rope: its child that computes a tuple of rotary tables for them. In either travels the grid,
        because gradient checkpointing calls a block again, with the same arguments, when other
        forward passes may have come in between. Without both, the last forward's grid counts.
    in_data: whether `grids` looks at the data, which a graph cannot.
    timestep: the model's argument with the timestep.
    alone: other lists of blocks of its tokens, which are left alone, and why: for reports.
    """

    models: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    grids: Callable[[Any, dict], tuple[Grid, ...]]
    kwargs: str = ""
    rope: str = ""
    in_data: bool = False
    timestep: str = "timestep"
    alone: tuple[tuple[str, str], ...] = ()


def image_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """The grid of latents [B, C, H, W] that the model cuts into square patches."""
    h, w = given["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return ((1, h // patch, w // patch),)


def video_grid(model: Any, given: dict) -> tuple[Grid, ...]:
    """The grid of latents [B, C, F, H, W], cut into square patches of some frames."""
    frames, h, w = given["hidden_states"].shape[-3:]
    patch, together = model.config.patch_size, model.config.patch_size_t
    return ((frames // together, h // patch, w // patch),)
