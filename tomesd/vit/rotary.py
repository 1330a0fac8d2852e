"""Rotary positions: the angles by which attention rotates the queries and keys of merged tokens."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tomesd.core.rows import fixed
from tomesd.core.token_map import TokenMap


@dataclass(frozen=True)
class Rotary:
    """How an attention gets the angles of its tokens. A merged token takes those of its head.

    >>> Rotary("position_embeddings").name
    'position_embeddings'

    name: the argument of the attention with a table, or a tuple of tables (cosines and sines),
        [N, D], [heads, N, D] or [B, heads or 1, N, D]. Class and register tokens, which lead and
        never merge, may be missing from it.
    dims: how many dimensions a table must have that differs between the samples of a batch: 4 for
        [B, heads or 1, N, D]; 3 for [B, N, D]; 2 for [N, D], where the host has no batch at all.
    """

    name: str
    dims: int = 4

    def merged(self, angles: Any, so_far: TokenMap) -> Any:
        """The angles of the merged tokens. so_far: from the tokens that the angles are of."""
        if angles is None or so_far.m == so_far.n:
            return angles
        if isinstance(angles, (tuple, list)):
            return tuple(self.merged(table, so_far) for table in angles)
        table = angles.view((1,) * (4 - angles.dim()) + angles.shape)
        leading = so_far.n - fixed(table.shape[2])
        merged = self.pick(table.expand(so_far.size.shape[0], -1, -1, -1), so_far, leading)
        return merged if self.dims == 4 else merged[:, 0] if self.dims == 3 else merged[0, 0]

    def pick(self, table: Tensor, so_far: TokenMap, leading: int) -> Tensor:
        """table: [B, heads or 1, N - leading, D], without the leading tokens."""
        head = so_far.head[:, None, leading:, None] - leading
        return table.gather(2, head.expand(-1, table.shape[1], -1, table.shape[3]))
