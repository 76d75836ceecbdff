import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import trimesh

from hi3d_jax.cameras import orbit
from hi3d_jax.data import dataset
from hi3d_jax.data.dataset import RenderSettings, finish, make_plan, missing_shards, render_shard
from hi3d_jax.data.record_folder import RecordFolder, verify
from hi3d_jax.data.records import RecordError, units_to_depth
from hi3d_jax.data.render import load_object
from hi3d_jax.data.runners import run_processes
from hi3d_jax.mesh import render

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = RenderSettings(size=24, num_views=4, orbits=2, supersample=1, assets_per_shard=3, seed=5)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Eight coloured boxes, and a file that is none."""
    folder = tmp_path_factory.mktemp("objects")
    for number in range(8):
        box = trimesh.creation.box((1, 0.4 + 0.07 * number, 0.6))
        box.visual.vertex_colors = np.tile([25 * number, 100, 200, 255], (8, 1)).astype(np.uint8)
        box.export(folder / f"box{number}.ply")
    (folder / "broken.glb").write_bytes(b"glTF but no more")
    return folder


def render_all(folder, objects, settings=SETTINGS, workers=1):
    plan = make_plan(folder, str(objects), settings)
    done = [shard for shard, _ in run_processes(folder, plan, missing_shards(folder, plan), workers)]
    return finish(folder, plan), done


@pytest.fixture(scope="module")
def rendered(objects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered") / "set"
    counts, _ = render_all(folder, objects)
    return folder, counts


def test_records_show_the_object_from_the_stated_cameras(objects, rendered):
    held = RecordFolder(rendered[0])
    assert len(held) == rendered[1]["records"] == 16
    assert len(held.shards) == 3
    assert len({line["elevation_deg"] for line in held.lines}) == 16
    assert all(-10 <= line["elevation_deg"] <= 40 and 0 <= line["azimuth_deg"] < 360 for line in held.lines)
    record = held[held.index_of_key["box3/1"]]
    cameras = orbit(record.azimuth_deg + 90 * np.arange(4), record.elevation_deg, width=24)
    truth = render(load_object(objects / "box3.ply"), cameras, light="soft", supersample=1)
    np.testing.assert_array_equal(record.views[..., 3], np.round(255 * truth.alphas))
    seen = record.views[..., 3] == 255
    np.testing.assert_allclose(record.views[seen][:, :3], 255 * truth.views[seen], atol=0.501)
    assert (record.views[~seen][:, :3] == 255).all()
    depth = units_to_depth(record.depths)
    np.testing.assert_allclose(depth, np.where(np.isfinite(truth.depths), truth.depths, 0), atol=5.1e-5)
    assert record.about["object_id"] == "box3"
    (skipped,) = (json.loads(line) for line in (rendered[0] / "skipped.jsonl").read_text().splitlines())
    assert skipped["id"] == "broken"
    assert "cannot be read as a mesh" in skipped["reason"]
    assert verify(rendered[0]) == []


def test_only_what_is_missing_or_cut_short_is_rendered_again_and_comes_out_the_same(objects, rendered):
    folder, counts = rendered
    (folder / "shards" / "00001.array_record").unlink()
    path = folder / "shards" / "00002.array_record"
    path.write_bytes(path.read_bytes()[:1000])
    again, done = render_all(folder, objects)
    assert done == [1, 2]
    assert again == counts
    assert render_all(folder, objects) == (counts, [])


def test_given_elevations_and_azimuth_replace_the_random_ones(objects, tmp_path):
    settings = dataclasses.replace(SETTINGS, elevations_deg=(0.0, 30.0), azimuth_deg=45.0, depths=False)
    render_all(tmp_path / "set", objects, settings)
    held = RecordFolder(tmp_path / "set")
    assert {(line["elevation_deg"], line["azimuth_deg"]) for line in held.lines} == {(0.0, 45.0), (30.0, 45.0)}
    assert held[0].depths is None


def test_another_plan_or_a_folder_with_other_files_is_refused(objects, rendered, tmp_path):
    folder = rendered[0]
    with pytest.raises(RecordError, match=r"begun with \{'size': 24\}, not \{'size': 32\}"):
        make_plan(folder, str(objects), dataclasses.replace(SETTINGS, size=32))
    with pytest.raises(RecordError, match="9 then, 2 now"):
        make_plan(folder, str(objects), SETTINGS, limit=2)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RecordError, match="holds other files"):
        make_plan(tmp_path, str(objects), SETTINGS)
    with pytest.raises(ValueError, match=r"elevations .* must lie within"):
        dataclasses.replace(SETTINGS, elevations_deg=(95.0,)).check()
    make_plan(tmp_path / "begun", str(objects), SETTINGS)
    with pytest.raises(RecordError, match="rendering has not finished"):
        RecordFolder(tmp_path / "begun")


def test_an_object_that_kills_its_process_is_given_up(objects, tmp_path):
    plan = make_plan(tmp_path / "set", str(objects), SETTINGS)
    deadly, counter = plan.shards[0][1], tmp_path / "set" / "shards" / "00000.deaths"
    # A killed process enters the block and never leaves it.
    blocks = [dataset._blame(counter, deadly) for _ in range(dataset.MAX_DEATHS)]
    for block in blocks:
        block.__enter__()
        dataset._accused.clear()
    note = render_shard(tmp_path / "set", 0, plan.shards[0], plan.settings)
    (reason,) = (line["reason"] for line in note["skipped"] if line["id"] == deadly.id)
    assert "ended 3 processes" in reason
    assert len(note["lines"]) == 2 * sum(asset.id not in (deadly.id, "broken") for asset in plan.shards[0])
    assert not counter.exists()


def start_command(objects, output, *more):
    """The command line, rendering slowly enough to be disturbed."""
    command = [sys.executable, str(ROOT / "experiments" / "render_dataset.py"), str(objects), "-o", str(output)]
    command += ["--size", "128", "--supersample", "3", "--assets-per-shard", "1", "--workers", "2", *more]
    # Ray's workers are nice to others, and starve where a whole suite runs beside them.
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **ray}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)


def kill_a_worker(process, output, is_worker):
    """Waits until the first shard is there, then kills a worker with SIGKILL."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
        if workers and list(output.glob("shards/*.json")):
            workers[0].send_signal(signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError(f"no worker was seen at work; the command said: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def undisturbed(objects, tmp_path_factory):
    """The hash of the same set, rendered by one process in one go."""
    settings = RenderSettings(size=128, supersample=3, assets_per_shard=1)
    return render_all(tmp_path_factory.mktemp("undisturbed") / "set", objects, settings)[0]["sha256"]


def is_pool_worker(child):
    return "spawn_main" in " ".join(child.cmdline())


def is_busy_ray_worker(child):
    return "ray::render_shard" in " ".join(child.cmdline())


RUNNERS = {"processes": ((), is_pool_worker), "ray": (("--runner", "ray"), is_busy_ray_worker)}


@pytest.mark.parametrize(("options", "is_worker"), RUNNERS.values(), ids=RUNNERS)
def test_a_killed_worker_loses_nothing_and_changes_nothing(objects, undisturbed, tmp_path, options, is_worker):
    if options:
        pytest.importorskip("ray", reason="needs the extra ray")
    process = start_command(objects, tmp_path / "set", *options)
    try:
        kill_a_worker(process, tmp_path / "set", is_worker)
        said = process.communicate(timeout=400)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert "8 orbits in 8 shards, 1 objects skipped" in said
    assert undisturbed in said
    assert "skipped broken" in said
    assert {path.suffix for path in (tmp_path / "set" / "shards").iterdir()} == {".array_record", ".json"}
    assert not list((tmp_path / "set" / "shards").glob(".*"))
