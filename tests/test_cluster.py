"""Work on a Ray cluster of this machine alone: what comes back, what a dying worker costs, and many pictures on it."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from hi3d_jax import images
from hi3d_jax.cli import main
from hi3d_jax.cluster import ClusterError, run_on_ray
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe

pytest.importorskip("ray", reason="needs the extra ray")
# What Ray warns of in its own code, and what its subprocesses leave open.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning")
] + [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers are nice to others, and starve where a whole suite runs beside them.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("HI3D_CACHE", str(tmp_path_factory.mktemp("cache")))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        yield
        ray.shutdown()


def test_what_fails_costs_nothing_else(cluster, tmp_path):
    def work(name, tries):
        # Of each call a line, for the processes do not outlive it.
        with open(tries / name, "a") as file:
            file.write("x")
        if name == "raises":
            raise ZeroDivisionError
        if name == "dies" or (name == "dies once" and len((tries / name).read_text()) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return name.upper()

    names = ("returns", "raises", "dies once", "dies")
    made = dict(
        run_on_ray(work, {name: (name, tmp_path) for name in names}, retries=1, died=lambda key, e: (key, type(e)))
    )
    assert (made["returns"], made["dies once"]) == ("RETURNS", "DIES ONCE")
    assert [made[name][0] for name in ("raises", "dies")] == ["raises", "dies"]
    assert issubclass(made["raises"][1], ZeroDivisionError)
    assert "Crashed" in made["dies"][1].__name__
    assert {name: len((tmp_path / name).read_text()) for name in names} == {
        "returns": 1,
        "raises": 1,
        "dies once": 2,
        "dies": 2,
    }
    with pytest.raises(ClusterError, match="99 CPUs, and no machine of the cluster has more than 2"):
        next(run_on_ray(work, {"x": ("x", tmp_path)}, cpus=99))


def test_many_pictures_go_to_the_cluster_and_each_is_reported(cluster, tmp_path, capsys):
    """Random networks draw no object, so the sound picture ends after stage 1: in its folder, by its worker."""
    write_random_model(
        tmp_path / "model", dataclasses.replace(Recipe.paper(1), num_views=2, image_size=48, num_steps=1)
    )
    (tmp_path / "in").mkdir()
    picture = np.ones((32, 32, 3), np.float32)
    picture[8:24, 8:24] = 0.2
    images.write_png(tmp_path / "in/sound.png", picture)
    (tmp_path / "in/broken.png").write_bytes((tmp_path / "in/sound.png").read_bytes()[:40])
    command = ["generate", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "model")]
    command += ["--runner", "ray", "--cpus-per-image", "1"]
    assert main(command) == 2
    broken, sound = json.loads((tmp_path / "out/report.json").read_text())
    assert "broken.png" in broken["error"]
    assert "no object on white was drawn" in sound["error"]
    assert sound["seconds"] > 0
    assert (tmp_path / "out/sound/generated/orbit.mp4").exists()
    assert "2 of 2 images failed" in capsys.readouterr().err
    # A model that is not there is one error, not one for each picture.
    command[command.index("-m") + 1] = str(tmp_path / "nowhere")
    assert main([*command, "--resume"]) == 2
    assert "nowhere is neither a folder nor" in capsys.readouterr().err
