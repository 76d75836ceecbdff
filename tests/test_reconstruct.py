"""The reconstruct stage on a small posed orbit: what it makes, refuses, keeps, and makes again when resumed."""

import dataclasses
import errno
import json

import numpy as np
import pytest

from experiments.benchmarks.kill_generate import SMALLEST as TINY
from hi3d_jax import cameras, cli, images, mesh, neus, splatting, stages, video
from hi3d_jax.stages import ReconstructConfig, RunError, StageError, pictures, reconstruct
from hi3d_jax.stages.checks import check_finite
from hi3d_jax.video import Orbit

STEPS = ["views", "splats", "interpolated", "surface", "mesh", "texture", "scores", "pictures"]


def ball(points):
    return (np.linalg.norm(points * [1.0, 1.0, 1.25], axis=1) - 0.4).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def small_turntable():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "TURNTABLE_SIZE", 48)
        yield


@pytest.fixture(scope="module")
def orbit() -> Orbit:
    """Eight views, 48 pixels wide, of a ball flattened along z and coloured by position."""
    bound = np.full(3, 0.5)
    body = mesh.decimate(mesh.extract_surface(ball, -bound, bound, 32), 600)
    painted = mesh.paint_texture(mesh.unwrap(body, 64), lambda points: (points + 0.5).astype(np.float32), 64)
    rig = cameras.orbit(np.arange(8) * 45.0, 20.0, width=48)
    renders = mesh.render(painted, rig)
    return Orbit(renders.views, renders.alphas, rig)


@pytest.fixture(scope="module")
def finished(orbit, tmp_path_factory):
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return reconstruct(orbit, folder, TINY, progress=False), folder


def test_a_run_leaves_what_a_person_can_look_at(finished, orbit):
    _, folder = finished
    assert mesh.is_watertight(mesh.read_mesh(folder / "mesh.glb"))
    assert len(splatting.read_ply(folder / "splats.ply")) == TINY.num_gaussians
    again = video.read_orbit(folder)
    np.testing.assert_allclose(again.views, orbit.views, atol=1 / 255)
    np.testing.assert_allclose(again.cameras.c2w, orbit.cameras.c2w, atol=1e-6)
    between = cameras.azimuths_deg(cameras.read_transforms(folder / "interpolated/cameras.json")[0])
    np.testing.assert_allclose(between, [90, 270], atol=1e-3)
    for name, frames in (("orbit.mp4", 8), ("turntable.mp4", 48)):
        assert len(video.read_frames(folder / name)) == frames
    sheet = images.read_image(folder / "contact_sheet.png")
    assert sheet[..., :3].std() > 0.05
    assert not [path for path in folder.rglob("*") if ".part" in path.name]


def test_the_result_is_near_the_views(finished):
    result, _ = finished
    assert result.scores.silhouette_iou > 0.93
    assert result.scores.psnr > 20
    assert result.report.watertight
    assert result.report.components == 1
    assert result.report.faces <= TINY.num_faces
    # The starting shape is the hull of an orbit that sees all sides but the underside.
    lower, upper = result.mesh.vertices.min(0), result.mesh.vertices.max(0)
    np.testing.assert_allclose(upper[:2] - lower[:2], 0.8, atol=0.06)


def test_the_record_tells_what_was_made_from_what(finished):
    result, folder = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0
    assert record["recipe"]["neus"]["iterations"] == 6
    assert record["input"]["views"] == 8
    assert {"jax", "hi3d_jax", "python"} <= record["versions"].keys()
    assert record["machine"]["device"].startswith("cpu")
    assert list(record["steps"]) == STEPS == list(result.seconds)
    for step in record["steps"].values():
        assert step["finished"]
        assert step["seconds"] >= 0
        assert 1e7 < step["peak_memory_bytes"] < 1e11
    assert record["results"]["psnr"] == pytest.approx(result.scores.psnr)
    assert record["results"]["mesh"]["watertight"] is True


@pytest.mark.parametrize("stop_after", ["splats", "surface", "texture"])
def test_a_resumed_run_gives_the_same_mesh(finished, orbit, tmp_path, stop_after, monkeypatch):
    """An interrupted run is one that lacks the later steps and files."""
    whole, folder = finished
    copied = tmp_path / "out"
    record = json.loads((folder / "run.json").read_text())
    kept = STEPS[: STEPS.index(stop_after) + 1]
    files = {"splats": ["splats.ply"], "surface": ["surface.npz"], "texture": ["geometry.ply", "mesh.glb"]}
    (copied / "interpolated").mkdir(parents=True)
    names = ["orbit.mp4", *(name for step in kept for name in files.get(step, []))]
    if "interpolated" in kept:
        names += [str(p.relative_to(folder)) for p in (folder / "interpolated").rglob("*") if p.is_file()]
    for name in names:
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes((folder / name).read_bytes())
    record["steps"] = {name: record["steps"][name] for name in kept}
    record["steps"][STEPS[len(kept)]] = {"seconds": None, "peak_memory_bytes": None, "finished": False}
    (copied / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(splatting, "fit", None)
    if stop_after != "splats":
        monkeypatch.setattr(neus, "fit", None)
    again = reconstruct(orbit, copied, TINY, resume=True, progress=False)
    np.testing.assert_array_equal(again.mesh.faces, whole.mesh.faces)
    np.testing.assert_array_equal(again.mesh.vertices, whole.mesh.vertices)
    np.testing.assert_array_equal(again.mesh.texture, whole.mesh.texture)
    assert again.scores == whole.scores
    assert (copied / "mesh.glb").read_bytes() == (folder / "mesh.glb").read_bytes()


def test_given_gaussians_are_not_fitted_again(finished, orbit, tmp_path, monkeypatch):
    """All that is made after the Gaussians is made of their file."""
    fitted = finished[1] / "splats.ply"

    def refuse(*given, **named):
        raise StageError("enough")

    monkeypatch.setattr(splatting, "fit", None)
    monkeypatch.setattr(splatting, "render", refuse)
    with pytest.raises(StageError, match="enough"):
        reconstruct(orbit, tmp_path, TINY, progress=False, gaussians=splatting.read_ply(fitted))
    assert (tmp_path / "splats.ply").read_bytes() == fitted.read_bytes()
    with pytest.raises(RunError, match="was begun with other views or splats"):
        reconstruct(orbit, tmp_path, TINY, resume=True, progress=False)


def test_a_run_is_only_continued_with_what_it_was_begun_with(finished, orbit):
    _, folder = finished
    before = (folder / "run.json").read_bytes()
    with pytest.raises(RunError, match="already holds a run; continue it with --resume"):
        reconstruct(orbit, folder, TINY, progress=False)
    with pytest.raises(RunError, match="was begun with seed = 0, not 1"):
        reconstruct(orbit, folder, dataclasses.replace(TINY, seed=1), resume=True, progress=False)
    with pytest.raises(RunError, match=r"was begun with recipe\.num_faces = 400, not 500"):
        reconstruct(orbit, folder, dataclasses.replace(TINY, num_faces=500), resume=True, progress=False)
    other = dataclasses.replace(orbit, views=orbit.views[:, ::-1].copy())
    with pytest.raises(RunError, match="was begun with other views"):
        reconstruct(other, folder, TINY, resume=True, progress=False)
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"steps": 3}'])
def test_a_damaged_record_is_named(orbit, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json is damaged .*; begin anew in another folder"):
        reconstruct(orbit, tmp_path, TINY, resume=True, progress=False)


def test_without_interpolated_views_no_gaussians_are_fitted(orbit, monkeypatch):
    monkeypatch.setattr(splatting, "fit", None)
    seen = {}
    fit = neus.fit

    def noticing(views, *rest, **options):
        seen["views"] = len(views)
        return fit(views, *rest, **options)

    monkeypatch.setattr(neus, "fit", noticing)
    result = reconstruct(orbit, None, dataclasses.replace(TINY, num_interpolated=0), progress=False)
    assert result.gaussians is None
    assert seen == {"views": 8}
    assert list(result.seconds) == ["views", "surface", "mesh", "texture", "scores"]
    assert result.report.watertight


def broken(orbit: Orbit, **change) -> Orbit:
    return dataclasses.replace(orbit, **change)


def with_mask(orbit: Orbit, value: float) -> Orbit:
    alphas = orbit.alphas.copy()
    alphas[3] = value
    return broken(orbit, alphas=alphas)


def with_cameras(orbit: Orbit, scale=1.0, shift=(0, 0, 0), nan=False) -> Orbit:
    c2w = orbit.cameras.c2w.copy()
    c2w[:, :3, 3] = c2w[:, :3, 3] * scale + np.asarray(shift, np.float32)
    c2w[2, 0, 0] = np.nan if nan else c2w[2, 0, 0]
    return broken(orbit, cameras=dataclasses.replace(orbit.cameras, c2w=c2w.astype(np.float32)))


def with_nan(orbit: Orbit) -> Orbit:
    views = orbit.views.copy()
    views[1, 2, 3] = np.nan
    return broken(orbit, views=views)


def moved_apart(orbit: Orbit) -> Orbit:
    """Every other mask in the upper half of the picture, the rest in the lower."""
    alphas = np.zeros_like(orbit.alphas)
    alphas[::2, 2:20, 10:40], alphas[1::2, 28:46, 10:40] = 1, 1
    return broken(orbit, alphas=alphas)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: with_mask(o, 0.0), "views: the mask of view 3 is empty"),
        (lambda o: with_mask(o, 1.0), "views: the mask of view 3 fills the picture"),
        (with_nan, "views: NaN or infinite"),
        (lambda o: with_cameras(o, nan=True), "camera of view 2 holds NaN"),
        (lambda o: Orbit(o.views[:2], o.alphas[:2], o.cameras[:2]), "2 views bound no shape"),
        (lambda o: broken(o, cameras=o.cameras.resized(10, 10)), "resize the cameras to the views"),
        (lambda o: with_cameras(o, shift=(0, 0, 2)), "look at .*2.00.*, not at the origin"),
        (lambda o: with_cameras(o, scale=4.0), "scale the cameras' positions down"),
        (lambda o: with_cameras(o, scale=0.15), "scale the cameras' positions up"),
        (moved_apart, "no point of space projects into all masks"),
    ],
)  # fmt: skip
def test_what_cannot_be_reconstructed_is_refused_early(orbit, change, message, monkeypatch):
    monkeypatch.setattr(splatting, "fit", None)
    with pytest.raises(ValueError, match=message):
        reconstruct(change(orbit), None, TINY, progress=False)


def test_numbers_that_are_none_stop_with_the_steps_name(orbit, monkeypatch):
    fit = splatting.fit

    def diverging(*given, **options):
        made = fit(*given, **options)
        return dataclasses.replace(made, means=made.means.at[0].set(np.nan))

    monkeypatch.setattr(splatting, "fit", diverging)
    with pytest.raises(StageError, match="splats: NaN or infinite"):
        reconstruct(orbit, None, TINY, progress=False)
    check_finite("x", (np.arange(3), [np.ones(2)]))
    with pytest.raises(StageError, match="x: NaN"):
        check_finite("x", ([np.ones(2), np.array([np.inf])],))


@pytest.mark.parametrize(
    ("field", "value"), [("resolution", 4), ("texture_size", 10**6), ("num_interpolated", -1), ("num_faces", 1)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(RunError, match=f"{field} {value} is outside"):
        ReconstructConfig.preset("draft", **{field: value})


def test_presets_take_more_time_one_after_the_other():
    draft, standard, full = (ReconstructConfig.preset(quality) for quality in ("draft", "standard", "full"))
    for name in ("image_size", "hull_resolution", "num_gaussians", "resolution", "num_faces", "texture_size"):
        assert getattr(draft, name) < getattr(standard, name) < getattr(full, name)
    assert draft.neus.iterations < standard.neus.iterations < full.neus.iterations
    assert ReconstructConfig.preset("full", seed=3, num_faces=7).num_faces == 7


@pytest.fixture
def command(orbit, tmp_path, monkeypatch, capsys):
    """`hi3d reconstruct` on the small orbit with tiny settings: exit code and stderr."""
    monkeypatch.setenv("HI3D_CACHE", "off")
    monkeypatch.setattr(ReconstructConfig, "preset", lambda quality, **given: dataclasses.replace(TINY, **given))
    video.write_orbit(tmp_path / "orbit", orbit)

    def run(*options):
        code = cli.main(["reconstruct", str(tmp_path / "orbit"), "-o", str(tmp_path / "out"), *options])
        return code, capsys.readouterr()

    return run


def test_the_command_makes_a_mesh_and_says_how_good_it_is(command, tmp_path):
    code, said = command("--num-interpolated", "0")
    assert code == 0
    assert "silhouette IoU 0.9" in said.out
    assert str(tmp_path / "out/mesh.glb") in said.out
    assert "surface: " in said.out + said.err


def test_interrupted_in_the_surface_fit_and_resumed(command, tmp_path, monkeypatch):
    fit = neus.fit

    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(neus, "fit", interrupted)
    code, said = command()
    assert code == 130
    assert "continue with --resume" in said.err
    steps = json.loads((tmp_path / "out/run.json").read_text())["steps"]
    assert [name for name, step in steps.items() if step["finished"]] == ["views", "splats", "interpolated"]
    assert command()[0] == 2
    monkeypatch.setattr(neus, "fit", fit)
    monkeypatch.setattr(splatting, "fit", None)
    assert command("--resume")[0] == 0
    assert (tmp_path / "out/mesh.glb").exists()


def test_a_full_disk_costs_only_the_step_that_met_it(command, tmp_path, monkeypatch):
    write = splatting.write_ply

    def full(path, gaussians):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(splatting, "write_ply", full)
    code, said = command()
    assert code == 2
    assert said.err.splitlines()[-1].endswith(
        "splats.ply: No space left on device; free some space and try again; what is finished is kept, continue with "
        "--resume"
    )
    monkeypatch.setattr(splatting, "write_ply", write)
    assert command("--resume")[0] == 0


def test_the_stage_is_reached_from_the_package():
    assert stages.reconstruct is reconstruct
