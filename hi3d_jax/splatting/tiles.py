"""Which Gaussians touch which tile of the image, front to back, in arrays of fixed size.

One sort of the depths, one sort of packed integers (tile, rank in depth), no sort over pixels. Tiles are then ordered
by how much they hold and grouped, so that the tiles of a group, which are composited in lockstep, have about equally
long lists, and empty tiles cost nothing. The work of a group is cut into steps of STEP Gaussians per tile.

Array sizes must be known before compilation, the number of pairs (tile, Gaussian) is not: a `Capacity` bounds it.
`bin_footprints` reports when it was too small; nobody may use the lists then.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from hi3d_jax.splatting.projection import Footprints

# Measured on CPU: tiles of 16 pixels double the pairs of pixel and Gaussian; longer steps only take longer to compile.
# On two cores, groups of 32 take 1.3 to 1.7 times as long to composite, of 128 no less: more of their places are empty.
TILE = 8  # pixels along a side
GROUP = 64  # tiles composited in lockstep
STEP = 8  # Gaussians per tile composited in one iteration


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Sizes that must be fixed before compilation: pairs (tile, Gaussian), and steps of STEP x GROUP pairs."""

    pairs: int
    steps: int

    @staticmethod
    def holding(pairs: int, steps: int) -> Capacity:
        """The smallest capacity for these in quarters of powers of two, so that few different ones get compiled."""
        return Capacity(_round_up(pairs), _round_up(steps))

    def grown_to(self, pairs: int, steps: int) -> Capacity:
        """This capacity, or one with room to spare where it does not hold what is needed."""
        if pairs <= self.pairs and steps <= self.steps:
            return self
        return Capacity.holding(max(self.pairs, 3 * pairs // 2), max(self.steps, 3 * steps // 2))


def _round_up(needed: int) -> int:
    quarter = 1 << max(needed.bit_length() - 3, 4)
    return -(-max(needed, 1) // quarter) * quarter


class TileLists(NamedTuple):
    """`members` [s k t]: the Gaussians of step `s`, front to back along `k`, for the tiles `t` of its group; the index
    n (no Gaussian) fills up. `first_steps` [g+1]: where the steps of each group begin. `tiles` [g t]: the tiles of each
    group, row-major over the image's tiles; indices past the last tile fill up. `needed`: pairs and steps that there
    were to hold. `overflow`: true where they did not fit and the lists are not to be used.
    """

    members: Int[Array, "s k t"]
    first_steps: Int[Array, " _"]
    tiles: Int[Array, "g t"]
    needed: Int[Array, " 2"]
    overflow: Bool[Array, ""]


def tile_grid(width: int, height: int) -> tuple[int, int]:
    """Tiles along the image's width and height."""
    return -(-width // TILE), -(-height // TILE)


def needed_capacity(footprints: Footprints, width: int, height: int) -> Int[Array, " 2"]:
    """Pairs and steps that `bin_footprints` will need, counted without listing them."""
    counts = _counts_per_tile(*_touched(footprints, width, height), *tile_grid(width, height))
    _, steps = _group(counts)
    return jnp.stack([counts.sum(), steps.sum()])


def bin_footprints(footprints: Footprints, width: int, height: int, capacity: Capacity) -> TileLists:
    """Lists, for every tile, the Gaussians whose `half_extents` box meets it, sorted by depth."""
    columns, rows = tile_grid(width, height)
    count = footprints.depths.shape[0]
    first, last = _touched(footprints, width, height)
    counts = _counts_per_tile(first, last, columns, rows)
    depths = jnp.where(last[:, 0] >= first[:, 0], footprints.depths, jnp.inf)
    # Ties broken by index, as in any stable sort: equal depths composite in the order of the arrays.
    by_depth = jnp.argsort(depths, stable=True).astype(jnp.int32)
    sorted_ranks = _sorted_ranks(first[by_depth], last[by_depth], columns, rows, capacity.pairs)
    tiles, steps = _group(counts)
    first_steps = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(steps)])
    ends = jnp.cumsum(counts)
    slots, valid = _slots(tiles, first_steps, ends - counts, ends, capacity.steps)
    ranks = sorted_ranks[jnp.minimum(slots, capacity.pairs - 1)]
    members = jnp.where(valid, by_depth[jnp.minimum(ranks, count - 1)], count)
    needed = jnp.stack([ends[-1], first_steps[-1]])
    overflow = (needed > jnp.array([capacity.pairs, capacity.steps])).any()
    return TileLists(members, first_steps, tiles, needed, overflow)


def _touched(footprints: Footprints, width: int, height: int) -> tuple[Int[Array, "n 2"], Int[Array, "n 2"]]:
    """First and last tile (column, row) that each Gaussian's box meets; last < first where it meets none."""
    columns, rows = tile_grid(width, height)
    limit = jnp.array([columns, rows], jnp.float32)[None]
    # Pixel centres lie at +0.5: a box that ends before a tile's first centre does not touch it.
    first = jnp.ceil((footprints.means2d - footprints.half_extents - (TILE - 0.5)) / TILE)
    last = jnp.floor((footprints.means2d + footprints.half_extents - 0.5) / TILE)
    first, last = jnp.clip(first, 0.0, limit), jnp.clip(last, -1.0, limit - 1)
    drawn = (footprints.half_extents[:, 0] >= 0) & (last >= first).all(axis=1)
    none = jnp.array([[0, -1]])
    first = jnp.where(drawn[:, None], first.astype(jnp.int32), none[:, :1])
    return first, jnp.where(drawn[:, None], last.astype(jnp.int32), none[:, 1:])


def _counts_per_tile(first, last, columns, rows) -> Int[Array, " _"]:
    """Gaussians per tile, row-major: rectangles marked at their corners, then summed along both axes."""
    drawn = (last[:, 0] >= first[:, 0]).astype(jnp.int32)
    left, top, right, bottom = first[:, 0], first[:, 1], last[:, 0] + 1, last[:, 1] + 1
    marks = jnp.zeros((rows + 1, columns + 1), jnp.int32)
    marks = marks.at[top, left].add(drawn).at[bottom, right].add(drawn)
    marks = marks.at[top, right].add(-drawn).at[bottom, left].add(-drawn)
    return jnp.cumsum(jnp.cumsum(marks, axis=0), axis=1)[:rows, :columns].reshape(-1)


def _sorted_ranks(first, last, columns, rows, capacity) -> Int[Array, " _"]:
    """Ranks in depth of all pairs, tile after tile; `first` and `last` come in the order of depth."""
    count, num_tiles = first.shape[0], columns * rows
    spans = last - first + 1
    sizes = spans[:, 0] * spans[:, 1]
    starts = jnp.cumsum(sizes) - sizes
    rank = jnp.repeat(jnp.arange(count, dtype=jnp.int32), sizes, total_repeat_length=capacity)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    within = slot - starts[rank]
    span = jnp.maximum(spans[rank, 0], 1)
    tile = (first[rank, 1] + within // span) * columns + first[rank, 0] + within % span
    tile = jnp.where(slot < sizes.sum(), tile, num_tiles)
    rank_bits = max(count - 1, 1).bit_length()
    if rank_bits + num_tiles.bit_length() > 31:
        # Too large to pack: a stable sort of two arrays gives the same order, several times slower.
        return jax.lax.sort((tile, rank), num_keys=1, is_stable=True)[1]
    return jnp.sort((tile << rank_bits) | rank) & ((1 << rank_bits) - 1)


def _group(counts) -> tuple[Int[Array, "g t"], Int[Array, " g"]]:
    """Tiles in groups by falling length of their lists, and the steps each group takes."""
    padded = math.ceil(counts.shape[0] / GROUP) * GROUP
    counts = jnp.pad(counts, (0, padded - counts.shape[0]))
    tiles = jnp.argsort(-counts, stable=True).astype(jnp.int32)
    longest = counts[tiles[::GROUP]]
    return tiles.reshape(-1, GROUP), (longest + STEP - 1) // STEP


def _slots(tiles, first_steps, starts, ends, num_steps):
    """Positions in the sorted pairs [s k t] that each step composites, and which of them hold a pair."""
    step = jnp.arange(num_steps, dtype=jnp.int32)
    group = jnp.searchsorted(first_steps, step, side="right").astype(jnp.int32) - 1
    in_use = group < tiles.shape[0]
    group = jnp.minimum(group, tiles.shape[0] - 1)
    tile = tiles[group]
    exists = in_use[:, None] & (tile < starts.shape[0])
    tile = jnp.minimum(tile, starts.shape[0] - 1)
    offset = ((step - first_steps[group]) * STEP)[:, None, None] + jnp.arange(STEP)[None, :, None]
    slots = starts[tile][:, None, :] + offset
    return slots, exists[:, None, :] & (slots < ends[tile][:, None, :])
