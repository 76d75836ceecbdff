"""What a training run is: frozen dataclasses, every field with one line of help, stored as JSON with the run.

A run is a function of its config alone: data order, noise and weights follow from `seed`. `experiments/configs/*.py`
hold the configs with names; the command line overrides single fields (`--optimizer.learning_rate=3e-4`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from hi3d_jax.data.loader import LoaderConfig
from hi3d_jax.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at a pace of their own; the first group whose regex matches a parameter takes it."""

    # Regex, matched in full against network.dotted.path, for instance "unet\\..*temporal.*".
    paths: str
    # What their learning rate is multiplied with; 0 freezes them and keeps no moments.
    learning_rate_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates (Hu et al. 2021) of matrices, all else frozen; rank 0 trains the network itself."""

    # Rank of the updates; 0 turns them off.
    rank: int = 0
    # The update is scaled by alpha / rank; 0 means alpha = rank.
    alpha: float = 0.0
    # Regex of the matrices' paths: the attention's projections.
    paths: str = r".*\.attn\d\.to_(q|k|v|out)\.kernel"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024), and the schedule."""

    # What makes steps of gradients. Muon makes every matrix's and every kernel's step a scaled rotation, as long as
    # AdamW's are (Liu et al. 2025, section 2.2), so that all else may stay; vectors take AdamW's.
    method: Literal["adamw", "muon"] = "adamw"
    # Peak learning rate.
    learning_rate: float = 1e-5
    # Steps over which the learning rate rises linearly from 0.
    warmup_steps: int = 0
    # Shape of the decay; constant ignores the three fields below.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Step at which the decay begins.
    decay_start: int = 0
    # Steps that the decay takes.
    decay_steps: int = 0
    # Learning rate at the end of the decay, as a fraction of the peak.
    final_fraction: float = 0.0
    # Decay rate of the first moment's average.
    b1: float = 0.9
    # The same for the second moment.
    b2: float = 0.999
    # Added to the root of the second moment.
    epsilon: float = 1e-8
    # Decoupled weight decay.
    weight_decay: float = 0.01
    # Whether biases, norms' scales and other vectors decay too, as in PyTorch's default.
    decay_vectors: bool = False
    # Gradients longer than this, over all parameters, are scaled down to it; 0 turns it off.
    clip_norm: float = 1.0
    # Parts that a batch is split in, one after the other, their gradients averaged: less memory, the same step.
    accumulate: int = 1
    # Decay of the average of the weights that samples and exports use; 0 keeps none.
    ema_decay: float = 0.0
    # Parameters with a learning rate of their own.
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self):
        if self.schedule != "constant" and self.decay_steps < 1:
            raise ValueError(f"optimizer.schedule={self.schedule} needs optimizer.decay_steps, not {self.decay_steps}")
        if self.accumulate < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"optimizer.accumulate={self.accumulate} must be at least 1, optimizer.ema_decay={self.ema_decay} "
                "at least 0 and below 1"
            )
        for group in self.groups:
            try:
                re.compile(group.paths)
            except re.error as error:
                raise ValueError(f"optimizer.groups: {group.paths!r} is no regular expression ({error})") from error


@dataclasses.dataclass(frozen=True)
class DataConfig(LoaderConfig):
    """Where batches come from and what they hold."""

    # Folder of records that render_dataset.py wrote; "example" is a built-in toy, made on the fly.
    folder: str = "example"
    # Held-out records for validation, whose latents are never cached; empty for none.
    validation_folder: str = ""
    # Records with cached latents and image tokens (the names in `arrays`) of those in `folder`; empty for none.
    cache_folder: str = ""
    # Stage 2: records with outputs of stage 1 for those in `folder`; empty for none.
    stage1_folder: str = ""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged: batches are split over data, fsdp and views, parameters over fsdp, tensor and views."""

    # Devices over which batches are split; one of the four may be -1: all that are left.
    data: int = -1
    # Devices over which parameters and batches are split.
    fsdp: int = 1
    # Devices over which parameters are split by channels.
    tensor: int = 1
    # Devices over which the views of each orbit, and parameters, are split: less memory than an orbit needs on one
    # device, and more devices than there are orbits. task.views_at_a_time must then be a multiple of it.
    views: int = 1
    # Whether this is one of several processes that train together (jax.distributed).
    distributed: bool = False
    # host:port of process 0; where the cluster tells it, leave this and the next two.
    coordinator: str = ""
    # The number of processes.
    num_processes: int = 0
    # This process's number, from 0.
    process_id: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    # Steps between checkpoints; one more is written at the end and at SIGTERM.
    every_steps: int = 1000
    # Latest checkpoints kept.
    keep: int = 3
    # Best checkpoints (lowest validation loss) kept besides; needs data.validation_folder.
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What can be watched."""

    # Steps between lines of metrics.
    every_steps: int = 50
    # Steps between pictures of what the model makes; 0 for none.
    samples_every_steps: int = 1000
    # Examples in such a picture.
    samples: int = 4
    # Steps between rounds of validation; 0 for none.
    validate_every_steps: int = 1000
    # Batches in such a round.
    validation_batches: int = 8
    # Whether TensorBoard's event files are written beside metrics.jsonl.
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Steps whose loss or gradient is not finite, or much longer than usual, change nothing."""

    # A gradient this many times longer than the running average of its length is a spike; 0 lets all finite ones pass.
    spike_factor: float = 20.0
    # Steps before spikes are looked for.
    warmup_steps: int = 100
    # Skipped steps in a row after which the run stops.
    max_skipped: int = 20


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    # What is learnt, by which networks.
    task: Task
    # Folder of the run: config.json, checkpoints/, metrics.jsonl, samples/.
    folder: str = "runs/unnamed"
    # Steps of the optimiser in all.
    steps: int = 80_000
    # Seed of the first weights, the data's order and all noise.
    seed: int = 0
    # First weights: empty for random ones, or a model folder or hub id, of whose networks those with the same names
    # are taken.
    start: str = ""
    # What networks compute in; weights and optimiser stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Where batches come from and what they hold.
    data: DataConfig = DataConfig()
    # How steps are made of gradients, and their schedule.
    optimizer: OptimizerConfig = OptimizerConfig()
    # Low-rank updates instead of whole networks.
    lora: LoRAConfig = LoRAConfig()
    # How devices are arranged.
    mesh: MeshConfig = MeshConfig()
    # When the run is saved and what is kept.
    checkpoint: CheckpointConfig = CheckpointConfig()
    # What can be watched.
    log: LogConfig = LogConfig()
    # What happens to steps gone wrong.
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        if self.steps < 1 or self.data.batch_size < 1:
            raise ValueError(f"steps={self.steps} and data.batch_size={self.data.batch_size} must be at least 1")
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} does not divide into optimizer.accumulate="
                f"{self.optimizer.accumulate} parts"
            )


# What may differ when a run is taken up again: how long, where and how it is watched, not what is computed.
FREE_AT_RESUME = re.compile(
    r"folder|steps|mesh\..*|checkpoint\..*|log\..*|data\.(read_threads|prefetch|workers|\w*folder)"
)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config's values by their names on the command line ("optimizer.learning_rate")."""
    values = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        values |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return values


def differences(stored: TrainConfig, given: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs: (fields that may, fields that make it another run), each as "name: stored -> given"."""
    before, after = flat(stored), flat(given)
    names = [name for name in {**before, **after} if before.get(name, "none") != after.get(name, "none")]
    lines = {name: f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in names}
    free = [line for name, line in lines.items() if FREE_AT_RESUME.fullmatch(name)]
    return free, [line for line in lines.values() if line not in free]
