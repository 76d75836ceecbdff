"""Kills a run at random and compares its end with an undisturbed one: python experiments/benchmarks/kill_resume.py

A tiny autoencoder trains with a checkpoint at every step, so that many kills (SIGKILL, no warning) fall into a save.
After `--kills` kills, each at a random moment after the run has come back to training, the run is left to finish.
Parameters, optimiser, average and the input's position must equal the undisturbed run's bit by bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import jax
import numpy as np

from hi3d_jax.training import sharding
from hi3d_jax.training.checkpoint import read_checkpoint, steps_in
from hi3d_jax.training.loop import load_config
from hi3d_jax.training.program import TrainProgram

ROOT = Path(__file__).resolve().parents[2]
FIELDS = (
    "--task.vae.block_channels=32",
    "--task.crop=0",
    "--data.batch_size=8",
    "--data.num_views=1",
    "--data.image_size=8",
    "--data.category_power=1",
    "--checkpoint.every_steps=1",
    "--log.samples_every_steps=0",
    "--log.tensorboard=False",
)


def start(folder: Path, steps: int, devices: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), "--config=autoencoder_tiny", *FIELDS]
    command += [f"--folder={folder}", f"--steps={steps}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(folder: Path, steps: int, devices: int) -> None:
    if start(folder, steps, devices).wait():
        raise SystemExit(f"the run in {folder} failed: run it by hand to see why")


def kill_at_random(folder: Path, steps: int, devices: int, longest: float) -> str:
    """Starts the run and kills it some time after its first new step; says where it stood."""
    checkpoints = folder / "checkpoints"
    before = max(steps_in(checkpoints), default=0)
    process = start(folder, steps, devices)
    while process.poll() is None and max(steps_in(checkpoints), default=0) == before:
        time.sleep(0.005)
    time.sleep(random.uniform(0, longest))
    if process.poll() is not None:
        return "had already finished"
    process.send_signal(signal.SIGKILL)
    process.wait()
    writing = [path.name for path in checkpoints.glob("*") if not path.name.isdigit()]
    return f"after step {max(steps_in(checkpoints))}" + (
        f", while writing {writing[0].split('.')[0]}" if writing else ""
    )


def contents(folder: Path, step: int) -> tuple[list[np.ndarray], list]:
    """All numbers of a checkpoint, and the positions of the input."""
    config = load_config(folder)
    program = TrainProgram(config, sharding.make_mesh(config.mesh))
    path = folder / "checkpoints" / str(step)
    state, positions = read_checkpoint(path, program.state, program.state_shardings)
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return [np.asarray(leaf) for leaf in leaves], positions


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if all ends are equal."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("--kills", type=int, default=10, help="kills of each run")
    parser.add_argument("--steps", type=int, default=60, help="steps of the run")
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 8], help="numbers of simulated devices")
    parser.add_argument("--longest", type=float, default=0.5, help="seconds after a new step, at most, until a kill")
    options = parser.parse_args(arguments)
    equal = True
    for devices in options.devices:
        with tempfile.TemporaryDirectory() as scratch:
            undisturbed, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
            finish(undisturbed, options.steps, devices)
            for number in range(options.kills):
                where = kill_at_random(killed, options.steps, devices, options.longest)
                print(f"{devices} device(s), kill {number + 1}: {where}", flush=True)
            finish(killed, options.steps, devices)
            (numbers, position), (others, other) = (contents(run, options.steps) for run in (killed, undisturbed))
            same = position == other and len(numbers) == len(others) and all(map(np.array_equal, numbers, others))
            print(f"{devices} device(s): {len(numbers)} arrays " + ("bit-equal" if same else "NOT equal"), flush=True)
            equal &= same
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
