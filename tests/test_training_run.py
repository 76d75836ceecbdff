"""Whole runs of a tiny autoencoder on eight simulated devices: kills, SIGTERM, two processes, damage, full disks."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from experiments.export import main as export_command
from experiments.train import load_config, main, parse
from hi3d_jax.data.records import encode
from hi3d_jax.data.shards import write_records
from hi3d_jax.pretrained import PretrainedError, from_pretrained, parameters
from hi3d_jax.training import sharding
from hi3d_jax.training.batches import example_orbit, training_batches
from hi3d_jax.training.checkpoint import Checkpoints, read_checkpoint, steps_in
from hi3d_jax.training.config import CheckpointConfig, MeshConfig
from hi3d_jax.training.export import Export, export
from hi3d_jax.training.loop import TrainingStopped, watch_skipped
from hi3d_jax.training.loop import load_config as stored_config
from hi3d_jax.training.metric_writer import MetricWriter, read_metrics
from hi3d_jax.training.pace import PEAKS
from hi3d_jax.training.program import TrainProgram

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
CONFIG = f"""
from hi3d_jax.models.vae import AutoencoderConfig
from hi3d_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import AutoencoderTask


def get_config():
    return TrainConfig(
        task=AutoencoderTask(vae=AutoencoderConfig(block_channels=(32,), layers_per_block=1), crop=4),
        steps={STEPS},
        data=DataConfig(batch_size=8, num_views=1, image_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, ema_decay=0.9),
        checkpoint=CheckpointConfig(every_steps=1, keep=100),
        log=LogConfig(every_steps={STEPS}, samples_every_steps=0, tensorboard=False),
    )
"""


# Where a save fails, orbax leaves coroutines that nobody awaits and callbacks of loops that are closed; the garbage
# collector complains of them whenever it comes by.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine 'async_serialize:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the config, and a cache of compiled programs that all processes share."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text(CONFIG)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", before[0] or str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def arguments(place: Path, name: str, *more: str) -> list[str]:
    return [f"--config={place / 'tiny.py'}", f"--folder={place / name}", *more]


def start(place: Path, name: str, *more: str, devices: int = 8) -> subprocess.Popen:
    """The same run in a process of its own."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), *arguments(place, name, *more)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place
    )


def wait_for(process: subprocess.Popen, ready) -> None:
    while not ready():
        if process.poll() is not None:
            pytest.fail(f"the run ended too early: {process.communicate()[0]}")
        time.sleep(0.002)


def program(place: Path, name: str) -> TrainProgram:
    config = dataclasses.replace(load_config(str(place / "tiny.py")), folder=str(place / name))
    return TrainProgram(config, sharding.make_mesh(config.mesh))


def read(place: Path, name: str, step: int):
    """Everything that a checkpoint holds, as numbers."""
    made = program(place, name)
    state, positions = read_checkpoint(place / name / "checkpoints" / str(step), made.state, made.state_shardings)
    numbers = jax.tree.map(np.asarray, dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return numbers, positions


@contextlib.contextmanager
def largest_file(size: int):
    """No file may grow beyond so many bytes: to the writer, a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture(scope="module")
def reference(place):
    """A run that nothing disturbed."""
    assert main(arguments(place, "reference")) == 0
    return place / "reference"


def test_a_run_that_is_killed_and_stopped_ends_bit_equal(place, reference):
    checkpoints = place / "killed" / "checkpoints"
    process = start(place, "killed")
    # In the middle of writing: the third checkpoint has its temporary name.
    wait_for(process, lambda: any(path.name.startswith("3") for path in checkpoints.glob("*")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached, half_written = steps_in(checkpoints), [path for path in checkpoints.glob("*") if not path.name.isdigit()]
    assert reached
    assert max(reached) < STEPS
    process = start(place, "killed")
    wait_for(process, lambda: max(steps_in(checkpoints)) > max(reached))
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert ("half written" in output) == bool(half_written)
    assert f"from step {max(reached)}" in output or f"from step {max(reached) + 1}" in output
    if process.returncode != 0:
        assert process.returncode == 128 + signal.SIGTERM
        assert "was asked to stop" in output
    assert main(arguments(place, "killed")) == 0
    one, other = read(place, "killed", STEPS), read(place, "reference", STEPS)
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1], "the input must stand at the same place"
    assert read_metrics(place / "killed")[STEPS]["loss"] == read_metrics(reference)[STEPS]["loss"]


def test_two_processes_train_together_and_one_continues(place, reference):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mesh = ["--mesh.distributed=True", f"--mesh.coordinator=localhost:{port}", "--mesh.num_processes=2", "--steps=2"]
    processes = [start(place, "pair", *mesh, f"--mesh.process_id={number}", devices=4) for number in (0, 1)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert main(arguments(place, "pair", "--steps=4")) == 0
    (pair, positions), (alone, expected) = read(place, "pair", 4), read(place, "reference", 4)
    assert positions == expected
    # Sums over devices come in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), pair.params, alone.params)


# orbax leaves an event loop behind where a load fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_passed_over_with_a_message(place, reference, tmp_path):
    copy, said = tmp_path / "checkpoints", []
    subprocess.run(["cp", "-r", reference / "checkpoints", copy], check=True)
    data = max((copy / str(STEPS) / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    # Cut short before its checksums were written.
    (copy / str(STEPS - 1) / "sha256.json").unlink()
    for file in (copy / str(STEPS - 1) / "state").rglob("manifest.ocdbt"):
        file.write_bytes(file.read_bytes()[:20])
    (copy / f"{STEPS + 1}.orbax-checkpoint-tmp-0").mkdir()
    made = program(place, "reference")
    checkpoints = Checkpoints(copy, CheckpointConfig(), said.append)
    state, _ = checkpoints.restore(made.state, made.state_shardings)
    checkpoints.close()
    assert int(state.step) == STEPS - 2
    assert len(said) == 3
    assert f"step {STEPS + 1} is passed over: it was half written" in said[0]
    assert f"step {STEPS} is passed over: state/d/{data.name} is not as it was written" in said[1]
    assert f"step {STEPS - 1} is passed over" in said[2]
    assert (copy / f"damaged-{STEPS}").is_dir(), "nothing is deleted"


def test_a_full_disk_stops_no_training_and_spoils_no_checkpoint(place, reference, tmp_path):
    made, said = program(place, "reference"), []
    state, position = read_checkpoint(reference / "checkpoints" / "4", made.state, made.state_shardings)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2, keep_best=1), said.append)
    later = [dataclasses.replace(state, step=state.step + number) for number in range(6)]
    assert checkpoints.save(later[0], position[0])
    assert checkpoints.wait()
    with largest_file(10_000):
        written = checkpoints.save(later[1], position[0]) and checkpoints.wait()
    assert not written
    assert "could not be written" in said[0]
    assert "the checkpoint of step 4 stays" in said[0]
    assert steps_in(tmp_path / "checkpoints") == [4]
    for number, loss in ((2, 0.5), (3, 0.1), (4, 0.3), (5, 0.2)):
        assert checkpoints.save(later[number], position[0], {"validation_loss": loss})
    checkpoints.close()
    assert steps_in(tmp_path / "checkpoints") == [7, 8, 9], "the two latest and the best"
    restored, _ = read_checkpoint(tmp_path / "checkpoints" / "7", made.state, made.state_shardings)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)


def test_a_run_on_a_full_disk_goes_on_and_says_what_it_could_not_keep(place, reference, capsys):
    command = arguments(place, "full", "--log.every_steps=1")
    assert main([*command, "--steps=2"]) == 0
    with largest_file(10_000):
        assert main(command) == 1
    output, errors = capsys.readouterr()
    assert output.count("could not be written") == STEPS - 2, "every later checkpoint is tried"
    assert "the checkpoint of step 2 stays" in output
    assert f"step {STEPS} is reached, but its checkpoint could not be written: free space" in errors
    assert max(read_metrics(place / "full")) == STEPS
    # CPython 3.11's parser, which reads the configs' comments, fails where a collection finds the full disk's errors.
    gc.collect()
    gc.disable()
    try:
        assert main(command) == 0
    finally:
        gc.enable()
    one, other = read(place, "full", STEPS), read(place, "reference", STEPS)
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])


def test_a_damaged_record_ends_a_run_that_goes_on_from_there_when_it_is_mended(place, reference, capsys):
    data = load_config(str(place / "tiny.py")).data
    orbits = [example_orbit(number, data) for number in range(32)]
    write_records(place / "set", orbits, {}, per_shard=32)
    command = arguments(place, "spoilt", f"--data.folder={place / 'set'}", "--checkpoint.every_steps=100")
    batches = training_batches(parse(command)[0])
    key = [next(batches) for _ in range(3)][2]["keys"][0]
    path = place / "set" / "shards" / "00000.array_record"
    sound = path.read_bytes()
    bytes_of_record = encode(next(orbit for orbit in orbits if orbit.key == key))
    flipped = bytearray(sound)
    flipped[sound.index(bytes_of_record) + len(bytes_of_record) // 2] ^= 1
    path.write_bytes(flipped)
    assert main(command) == 1
    assert re.search(rf"error: record \d+ \({key}\) of {path}.* is damaged", capsys.readouterr().err)
    assert steps_in(place / "spoilt" / "checkpoints") == [2]
    path.write_bytes(sound)
    assert main(command) == 0
    assert "from step 2" in capsys.readouterr().out


def events(folder: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard's files hold: by step and tag the number, or a picture's height."""
    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        # Length, checksum, event, checksum; a full disk leaves half of one at the end.
        while len(data) >= at + 16 + (length := struct.unpack_from("<Q", data + bytes(8), at)[0]):
            event, at = Event.FromString(data[at + 12 : at + 12 + length]), at + 16 + length
            values = {value.tag: value.image.height or value.simple_value for value in event.summary.value}
            found[event.step] = found.get(event.step, {}) | values
    return found


def test_metrics_that_cannot_be_written_are_left_out_and_later_ones_are_whole(tmp_path):
    said, picture = [], np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    writer = MetricWriter(tmp_path, tensorboard=True, say=said.append)
    writer.scalars(1, "train", {"loss": 0.5})
    # The next line does not fit whole.
    with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 10):
        for step in (2, 3):
            writer.scalars(step, "train", {"loss": 0.4})
            writer.picture(step, picture)
    writer.scalars(4, "train", {"loss": np.nan})
    writer.picture(4, picture)
    writer.close()
    names = [line.partition(" cannot be written")[0] for line in said]
    assert names == [str(tmp_path / name) for name in ("metrics.jsonl", "tensorboard", "samples")]
    assert list(read_metrics(tmp_path)) == [1, 4]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["0000004.png"]
    shown = {step: values for step, values in events(tmp_path / "tensorboard").items() if values}
    assert {step: sorted(values) for step, values in shown.items()} == {1: ["train/loss"], 4: ["samples", "train/loss"]}
    assert (shown[1]["train/loss"], shown[4]["samples"]) == (0.5, 8)


def test_low_rank_updates_in_bfloat16_leave_all_else_as_it_was_and_can_be_watched(place, monkeypatch, capsys):
    # As if the eight devices had data sheets.
    monkeypatch.setitem(PEAKS, "cpu", 1e9)
    watch = ["--log.every_steps=1", "--log.samples_every_steps=2", "--log.validate_every_steps=2"]
    watch += ["--log.validation_batches=1", "--log.tensorboard=True", "--data.validation_folder=example"]
    lora = ["--lora.rank=2", r"--lora.paths=.*\.to_(q|k|v|out)\.kernel", "--precision=bfloat16"]
    assert main(arguments(place, "lora", "--steps=2", *lora, *watch)) == 0
    shown = events(place / "lora" / "tensorboard")[2]
    pace = [f"train/{name}" for name in ("seconds_per_step", "examples_per_second", "flops_per_second")]
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "validation/loss", *pace} <= set(shown)
    assert shown["train/mfu"] == pytest.approx(shown["train/flops_per_second"] / 8e9)
    # Four held-out examples of 8 pixels: true above, made below.
    with Image.open(place / "lora" / "samples" / "0000002.png") as picture:
        assert picture.size == (32, 16)
    assert shown["samples"] == 16
    made = TrainProgram(stored_config(place / "lora"), sharding.make_mesh(MeshConfig()))
    state, frozen = made.initial_state()
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, frozen))} == {np.dtype(np.float32)}
    batch = {"views": np.zeros((8, 1, 8, 8, 4), np.uint8)}
    assert "bf16" in str(jax.make_jaxpr(made.loss)(state.params, frozen, batch, state.key))
    command = [str(place / "lora"), "-o", str(place / "adapted"), "--batches", "1"]
    assert (export_command(command), export_command(command)) == (0, 1)
    assert "exists already" in capsys.readouterr().err
    vae = dict(parameters(from_pretrained(place / "adapted", "vae")))
    changed = {path for path, value in vae.items() if not np.array_equal(value, frozen["vae"][path])}
    assert changed == {path.removesuffix(".lora_up") for path in state.params["vae"] if path.endswith("_up")}
    assert len(changed) == 8


def test_what_was_learnt_leaves_as_a_model_folder(place, reference):
    line = export(reference, place / "model", Export(num_batches=2))
    assert f"the averaged weights of step {STEPS} in float32" in line
    vae = from_pretrained(place / "model", "vae")
    expected = read(place, "reference", STEPS)[0].ema["vae"]
    jax.tree.map(np.testing.assert_array_equal, dict(parameters(vae)), expected)
    assert vae.config.scaling_factor != load_config(str(place / "tiny.py")).task.vae.scaling_factor
    with pytest.raises(PretrainedError, match="exists already"):
        export(reference, place / "model")
    with pytest.raises(ValueError, match=r"no readable checkpoint of step 99"):
        export(reference, place / "other", Export(step=99))
    config = json.loads((reference / "config.json").read_text())
    assert config["task"]["crop"] == 4


def test_too_many_bad_steps_end_the_run():
    watch_skipped(5, {"skipped": 0}, 3)
    bad = {"skipped": 3, "loss": np.nan, "gradient_norm": np.inf}
    with pytest.raises(TrainingStopped, match=r"3 steps in a row were skipped, up to step 7"):
        watch_skipped(7, bad, 3)
