"""The batches that a run's task wants: from rendered records, or from a built-in toy that needs no files."""

from __future__ import annotations

import dataclasses

import grain
import numpy as np

from hi3d_jax.data.loader import Batch, open_batches
from hi3d_jax.data.record_folder import RecordFolder, RecordList
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.training.config import DataConfig, TrainConfig
from hi3d_jax.training.tasks import StageTask

# The setting of a data set of encoded examples (experiments/encode_examples.py) that says of what size the views were.
ENCODED_SIZE = "encoded_size"

EXAMPLE = "example"
EXAMPLE_ORBITS = 16


# Which part of every batch is read, and the number of parts: `sharding.reading_part`.
Part = tuple[int, int]
WHOLE: Part = (0, 1)


def training_batches(config: TrainConfig, part: Part = WHOLE) -> grain.DatasetIterator[Batch]:
    """An endless iterator over a part of every training batch. Raises `ValueError`, `RecordError`."""
    data = config.data
    if data.folder != EXAMPLE and (size := RecordFolder(data.folder).settings.get(ENCODED_SIZE)) is not None:
        data = _of_encoded(config, size)
    return _open(config, data, part, shuffle=True)


def _of_encoded(config: TrainConfig, size: int) -> DataConfig:
    """How examples are read that were encoded from views of `size` pixels: as they are, without pictures."""
    data, log = config.data, config.log
    if not isinstance(config.task, StageTask):
        raise ValueError(f"{data.folder} holds encoded examples of stage 2, which this task cannot learn")
    if size != data.image_size:
        raise ValueError(f"{data.folder} was encoded from views of {size} pixels, not {data.image_size}; make it again")
    if log.samples_every_steps and not data.validation_folder:
        raise ValueError(
            f"{data.folder} holds encoded examples and no pictures to draw samples of: set data.validation_folder, or "
            "log.samples_every_steps=0"
        )
    arrays = config.task.encoded_arrays()
    return dataclasses.replace(
        data, arrays=arrays, views=False, coarse=None, roll=False, cache_folder="", stage1_folder=""
    )


def validation_batches(config: TrainConfig, part: Part = WHOLE) -> grain.DatasetIterator[Batch]:
    """The same for validation: always the same batches in the same order."""
    # It is short and opened often: not worth starting processes for. What was made beforehand was made of the training
    # records; held-out ones are encoded in the step, and degraded.
    data = dataclasses.replace(config.data, folder=config.data.validation_folder, workers=0, stage1_folder="")
    if data.cache_folder:
        data = dataclasses.replace(data, cache_folder="", arrays=())
    return _open(config, data, part, shuffle=False)


def _open(config: TrainConfig, data: DataConfig, part: Part, shuffle: bool) -> grain.DatasetIterator[Batch]:
    return open_batches(
        RecordList([example_orbit(index, data) for index in range(EXAMPLE_ORBITS)])
        if data.folder == EXAMPLE
        else RecordFolder(data.folder),
        data,
        seed=config.seed,
        shuffle=shuffle,
        process_index=part[0],
        process_count=part[1],
        cache=RecordFolder(data.cache_folder) if data.cache_folder else None,
        stage1=RecordFolder(data.stage1_folder) if data.stage1_folder else None,
    )


def example_orbit(index: int, data: DataConfig) -> OrbitRecord:
    """A coloured ellipsoid seen from all sides: enough to see a model learn, and nothing to download."""
    rng = np.random.default_rng(index)
    num_views, size = data.num_views, data.image_size
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    axes, tints, phase = rng.uniform(0.3, 0.8, 3), rng.uniform(0, 1, (2, 3)), rng.uniform(0, 2 * np.pi)
    views = np.full((num_views, size, size, 4), 255, np.uint8)
    depths = np.zeros((num_views, size, size), np.uint16)
    for view, angle in enumerate(phase + 2 * np.pi * np.arange(num_views) / num_views):
        width = np.hypot(axes[0] * np.cos(angle), axes[1] * np.sin(angle))
        height = 1 - (x / width) ** 2 - (y / axes[2]) ** 2
        inside = height > 0
        mix = 0.5 + 0.5 * np.sin(3 * (np.arcsin(np.clip(x / width, -1, 1)) + angle) + 4 * y)[..., None]
        views[view, ..., :3] = np.round(255 * np.where(inside[..., None], tints[0] * mix + tints[1] * (1 - mix), 1))
        views[view, ..., 3] = 255 * inside
        depths[view] = np.where(inside, 15_000 - 5_000 * np.sqrt(np.maximum(height, 0)), 0)
    return OrbitRecord(f"example{index}/0", views, depths, elevation_deg=float(rng.uniform(-10, 40)))
