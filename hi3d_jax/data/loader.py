"""Batches of orbits for training, by grain: shuffled, split over processes, decoded ahead, exactly resumable.

The order of everything is decided on indices: position p of the endless sequence of examples is (record, random
seed), a function of the seed and p alone; only then are a batch's rows of this process read and decoded. So batches do
not depend on the number of processes or threads, and an iterator's state is a position.

A batch is a dict of numpy arrays:

| name | dtype, shape | what |
| --- | --- | --- |
| `views` | uint8 `[b t h w 4]` | sRGB, straight alpha, white where alpha is 0; opaque with random backgrounds |
| `elevation_deg` | float32 `[b]` | degrees |
| `keys` | str `[b]` | of the records |
| `depths` | float32 `[b t h w]` | z along the optical axis in longest sides, 0 where nothing is; with `depths` |
| `coarse` | uint8 `[b t h w 3]` | stage 2: the degraded views over white, view 0 clean; with `coarse` |
| others | `[b t ...]` | the arrays named in `arrays`, from the records or from a cache of them |

View 0 is the input view. An orbit starts at a random one of its views and keeps its order (HI3D.md section 6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

from hi3d_jax import images
from hi3d_jax.data.degrade import Degradation, degrade_views
from hi3d_jax.data.derived import check_derived
from hi3d_jax.data.record_folder import RecordFolder, RecordList
from hi3d_jax.data.records import RecordError, units_to_depth

Batch = Mapping[str, np.ndarray]
Orbits = RecordFolder | RecordList


@dataclasses.dataclass(frozen=True)
class CoarseConfig:
    """Stage 2's input videos: degraded views, and real outputs of stage 1 where there are some (paper section 4.3)."""

    # How views are degraded.
    degradation: Degradation = Degradation()
    # Share of examples that take an output of stage 1, of those orbits that have one.
    stage1_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What a batch holds."""

    # Orbits in a batch over all processes.
    batch_size: int = 16
    # Views of each orbit: all, or fewer, chosen at random (in order).
    num_views: int = 16
    # Side of the views in pixels; the stored ones are scaled to it.
    image_size: int = 512
    # Start every orbit at a random one of its views.
    roll: bool = True
    # Categories are drawn in proportion to their number of records to this power: 1 takes every record equally often,
    # 0 every category.
    category_power: float = 1.0
    # Transparent white, which is composited over white wherever it is used, or opaque over one random colour an orbit.
    background: Literal["white", "random"] = "white"
    # Whether views are needed at all: not where cached latents say everything.
    views: bool = True
    # Whether depths are needed.
    depths: bool = False
    # Arrays that the records, or the cache, hold for every view.
    arrays: tuple[str, ...] = ()
    # What stage 2 starts from; none for the other networks.
    coarse: CoarseConfig | None = None
    # Threads that read and decode ahead, and batches kept ready.
    read_threads: int = 2
    prefetch: int = 2
    # Processes that read and decode, each with those threads; 0 does it in this one.
    workers: int = 0

    def check(self) -> LoaderConfig:
        """Returns itself, or raises `ValueError` naming what does not go together and the remedy."""
        for name, least in (("batch_size", 1), ("num_views", 1), ("image_size", 8), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small; use at least {least}")
        if self.coarse is not None and not self.views:
            raise ValueError("coarse views are made from views: set views, or cache the coarse latents as arrays")
        if self.background == "random" and (self.coarse is not None or self.arrays):
            raise ValueError("coarse views and cached arrays are made over white; use background 'white' with them")
        return self


def open_batches(
    orbits: Orbits,
    config: LoaderConfig,
    *,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    cache: Orbits | None = None,
    stage1: Orbits | None = None,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over this process's rows of the batches; its `get_state()` and `set_state()` are grain's.

    Without `shuffle` records come in their order, unrolled, with draws that are the same in every epoch. `cache` has
    `arrays` under the records' keys. `stage1` has outputs of stage 1 as views, under the keys `KEY@START`, made from
    view START of the orbit KEY and beginning there. Raises `ValueError` and, while iterating, `RecordError`.
    """
    config.check()
    if cache is not None and not config.arrays:
        raise ValueError("nothing of the cache is asked for; name its arrays: data.arrays latents image_tokens")
    check_companions(orbits, config, cache, stage1)
    if config.batch_size % process_count:
        raise ValueError(f"a batch of {config.batch_size} does not divide by {process_count} processes: change it")
    own = config.batch_size // process_count
    first = process_index * own
    reader = ExampleReader(orbits, config, shuffle, cache, stage1)
    examples = _positions(orbits.lines, config, seed, shuffle).batch(config.batch_size)
    dataset = examples.map(lambda chosen: reader.batch(*(part[first : first + own] for part in chosen)))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(config.read_threads, config.prefetch))
    if config.workers:
        # Grain's workers read command-line flags, which only absl's own programs parse.
        flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers, config.prefetch))
    return iter(dataset)


def check_companions(orbits: Orbits, config: LoaderConfig, cache: Orbits | None, stage1: Orbits | None) -> None:
    """Raises `RecordError` where a cache or stage 1's outputs belong to other records or to another size."""
    if not isinstance(orbits, RecordFolder):
        return
    for made in (cache, stage1):
        if isinstance(made, RecordFolder):
            check_derived(made, orbits)
    size = cache.settings.get("size") if isinstance(cache, RecordFolder) else None
    if size is not None and size != config.image_size:
        raise RecordError(f"{cache.folder} was made for views of {size} pixels, not {config.image_size}; make it again")


def _positions(lines: list[dict], config: LoaderConfig, seed: int, shuffle: bool) -> grain.MapDataset:
    """The endless sequence of (record, seed of its random choices)."""
    # Endless for a trainer; grain's own endless repetition overflows with batches of one.
    epochs = (1 << 48) // len(lines)
    records = grain.MapDataset.range(len(lines)).seed(seed)
    if not shuffle:
        return records.map(lambda index: (index, index)).repeat(epochs)
    if config.category_power == 1:
        return records.shuffle().repeat(epochs).random_map(_with_seed)
    names, category = np.unique([line.get("category", "") for line in lines], return_inverse=True)
    members = [np.flatnonzero(category == number) for number in range(len(names))]
    weights = np.array([len(group) for group in members], np.float64) ** config.category_power
    limits = np.cumsum(weights) / weights.sum()

    def draw(_, rng: np.random.Generator):
        group = members[min(int(np.searchsorted(limits, rng.random(), side="right")), len(members) - 1)]
        return _with_seed(int(group[rng.integers(len(group))]), rng)

    return records.repeat(epochs).random_map(draw)


def _with_seed(index: int, rng: np.random.Generator) -> tuple[int, int]:
    return index, int(rng.integers(1 << 62))


class ExampleReader:
    """Turns (record, seed) into examples, and examples into batches."""

    def __init__(self, orbits: Orbits, config: LoaderConfig, roll: bool, cache: Orbits | None, stage1: Orbits | None):
        self._orbits, self._config, self._cache, self._stage1 = orbits, config, cache, stage1
        self._roll = config.roll and roll
        self._starts: dict[str, list[int]] = {}
        for key in stage1.index_of_key if stage1 is not None else ():
            orbit, _, start = key.rpartition("@")
            self._starts.setdefault(orbit, []).append(int(start))

    def batch(self, indices: np.ndarray, seeds: np.ndarray) -> Batch:
        """The examples, stacked."""
        examples = [self._example(int(index), int(seed)) for index, seed in zip(indices, seeds, strict=True)]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _example(self, index: int, seed: int) -> dict[str, np.ndarray | np.generic]:
        config, rng = self._config, np.random.default_rng(seed)
        key = self._orbits.lines[index]["key"]
        starts = self._starts.get(key)
        if starts and config.coarse is not None and rng.random() < config.coarse.stage1_share:
            stage1_start = starts[rng.integers(len(starts))]
        else:
            stage1_start = None
        turn, chosen = rng.random(), rng.random(64)

        def select(num_views: int) -> np.ndarray:
            """The views from the start on; of a part of them, the first and others in order."""
            if num_views < config.num_views or num_views > len(chosen):
                raise RecordError(f"it has {num_views} views where {config.num_views} are wanted; set num_views")
            start = stage1_start if stage1_start is not None else int(turn * num_views) if self._roll else 0
            others = np.argsort(chosen[1:num_views])[: config.num_views - 1] + 1
            return (start + np.sort(np.r_[0, others])) % num_views

        source_arrays = () if self._cache is not None else config.arrays
        record = self._orbits.read(index, views=config.views, depths=config.depths, arrays=source_arrays, select=select)
        example = {"elevation_deg": np.float32(record.elevation_deg), "keys": np.str_(key), **record.arrays}
        if self._cache is not None:
            example |= self._cached(key, select)
        if config.views:
            example["views"] = resized_views(_held(record.views, "views", key), config.image_size)
        if config.depths:
            example["depths"] = resized_depths(_held(record.depths, "depths", key), config.image_size)
        if config.coarse is not None and stage1_start is not None:
            example["coarse"] = self._stage1_views(f"{key}@{stage1_start}", example["views"], select, stage1_start)
        elif config.coarse is not None:
            example["coarse"] = degrade_views(example["views"], rng, config.coarse.degradation)
        if config.views and config.background == "random":
            example["views"] = over_colour(example["views"], rng.integers(0, 256, 3))
        return example

    def _cached(self, key: str, select) -> Batch:
        index = self._cache.index_of_key.get(key)
        if index is None:
            raise RecordError(f"the cache has nothing for record {key}; make it from the same data set")
        return self._cache.read(index, views=False, depths=False, arrays=self._config.arrays, select=select).arrays

    def _stage1_views(self, key: str, views: UInt8[np.ndarray, "t h w 4"], select, start: int):
        """Stage 1's output, which begins at `start`, scaled as the pipeline does; view 0 is the input view itself."""
        from_start = lambda num_views: (np.asarray(select(num_views)) - start) % num_views  # noqa: E731
        index = self._stage1.index_of_key[key]
        record = self._stage1.read(index, views=True, depths=False, arrays=(), select=from_start)
        coarse = enlarged(over_white_bytes(record.views), self._config.image_size)
        coarse[0] = over_white_bytes(views[:1])[0]
        return coarse


def _held(part: np.ndarray | None, name: str, key: str) -> np.ndarray:
    if part is None:
        raise RecordError(f"record {key} holds no {name}; render the data set with them")
    return part


def resized_views(views: UInt8[np.ndarray, "t h w 4"], size: int) -> UInt8[np.ndarray, "t size size 4"]:
    """Views at another size: area means of premultiplied colours where they shrink, bilinear where they grow."""
    height, width = views.shape[1:3]
    if (height, width) == (size, size):
        return views
    if height == width and height % size == 0:
        return _block_means(views, height // size)
    resized = [images.resize(view.astype(np.float32) / 255, size, size) for view in views]
    return images.to_bytes(np.stack(resized))


def enlarged(views: UInt8[np.ndarray, "t h w 3"], size: int) -> UInt8[np.ndarray, "t size size 3"]:
    """Views without alpha at another size: bilinear where they grow, area means where they shrink."""
    method = Image.Resampling.BILINEAR if size > views.shape[1] else Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(view).resize((size, size), method)) for view in views])


def _block_means(views: UInt8[np.ndarray, "t h w 4"], factor: int) -> UInt8[np.ndarray, "t h2 w2 4"]:
    """Exact area means over factor x factor pixels, in whole numbers."""
    colours, alphas = np.zeros((), np.uint32), np.zeros((), np.uint32)
    for row in range(factor):
        for column in range(factor):
            part = views[:, row::factor, column::factor]
            alpha = part[..., 3:].astype(np.uint32)
            colours, alphas = colours + part[..., :3] * alpha, alphas + alpha
    visible = np.maximum(alphas, 1)
    colours = np.where(alphas > 0, (colours + visible // 2) // visible, 255)
    count = factor * factor
    return np.concatenate([colours, (alphas + count // 2) // count], axis=-1).astype(np.uint8)


def resized_depths(depths: UInt16[np.ndarray, "t h w"], size: int) -> Float[np.ndarray, "t size size"]:
    """Stored depths at another size in longest sides; each pixel takes the depth nearest to its centre, unmixed."""
    places = [((np.arange(size) + 0.5) * side / size).astype(np.int64) for side in depths.shape[1:]]
    return units_to_depth(depths[:, places[0][:, None], places[1]])


def over_white_bytes(views: UInt8[np.ndarray, "t h w 4"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Views over white, rounded."""
    alpha = views[..., 3:].astype(np.uint16)
    return ((views[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def over_colour(views: UInt8[np.ndarray, "t h w 4"], colour: np.ndarray) -> UInt8[np.ndarray, "t h w 4"]:
    """Views over one colour (three numbers, 0 to 255), opaque."""
    alpha = views[..., 3:].astype(np.uint32)
    mixed = (views[..., :3] * alpha + colour.astype(np.uint32) * (255 - alpha) + 127) // 255
    return np.concatenate([mixed.astype(np.uint8), np.full_like(views[..., 3:], 255)], axis=-1)
