"""The command line: what it passes on, what it refuses and in which words, and that starting it is light."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
import types
import zipfile

import jax
import numpy as np
import pytest

from hi3d_jax import cameras, cli, data, images, video
from hi3d_jax.cli import compiled_programs, main, orbit_defaults, output
from hi3d_jax.cli.output import OutputError, prepare_output
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("HI3D_CACHE", "off")
    monkeypatch.delenv("HI3D_DEBUG", raising=False)


@dataclasses.dataclass(frozen=True)
class Config:
    """Stands in for ReconstructConfig: remembers what the command line chose."""

    quality: str
    fields: dict

    @staticmethod
    def preset(quality, **fields):
        return Config(quality, fields)


@pytest.fixture
def stage(monkeypatch):
    """A reconstruction that only takes notes, or raises `stage.error`."""
    notes = types.SimpleNamespace(calls=[], error=None)

    def reconstruct(orbit, output, config, *, resume):
        notes.calls.append((orbit, output, config, resume))
        if notes.error is not None:
            raise notes.error
        scores = types.SimpleNamespace(silhouette_iou=0.9, psnr=30.0)
        report = types.SimpleNamespace(watertight=True, faces=12)
        return types.SimpleNamespace(scores=scores, report=report, seconds={"views": 1.0})

    module = types.SimpleNamespace(ReconstructConfig=Config, reconstruct=reconstruct)
    monkeypatch.setitem(sys.modules, "hi3d_jax.stages.reconstruct", module)
    return notes


@pytest.fixture
def orbit_folder(tmp_path):
    """Sixteen pictures of a black square."""
    (tmp_path / "orbit").mkdir()
    picture = np.ones((32, 32, 3), np.float32)
    picture[8:24, 8:24] = 0
    for view in range(16):
        images.write_png(tmp_path / f"orbit/{view}.png", picture)
    return tmp_path / "orbit"


def run(capsys, *argv):
    """Exit code and what went to stderr."""
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_help_starts_without_numpy_or_jax():
    program = (
        "import sys\nfrom hi3d_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'jax', 'numpy', 'scipy', 'trimesh'} & set(sys.modules), 'heavy imports'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "reconstruct" in result.stdout
    assert "render" in result.stdout


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"hi3d {command} " in capsys.readouterr().out.split("examples:")[1]


def test_orbit_defaults_are_those_of_the_cameras():
    assert orbit_defaults.ORBIT_RADIUS == cameras.ORBIT_RADIUS
    assert orbit_defaults.ORBIT_FOV_DEG == cameras.ORBIT_FOV_DEG
    assert orbit_defaults.ORBIT_NUM_VIEWS == cameras.ORBIT_NUM_VIEWS


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hi3d 0.")


@pytest.mark.parametrize(
    "argv", [[], ["reconstruct"], ["reconstruct", "a"], ["recon"], ["reconstruct", "a", "-o", "b", "--qualty", "full"]]
)
def test_misspelt_commands_exit_with_2(argv, capsys):
    assert run(capsys, *argv)[0] == 2


def test_options_reach_the_orbit_and_the_config(orbit_folder, tmp_path, stage, capsys):
    options = "--quality draft --elevation-deg 20 --fov-deg 40 --radius 2 --num-interpolated 0 --faces 500 --seed 7"
    assert run(capsys, "reconstruct", orbit_folder, "-o", tmp_path / "out", *options.split())[0] == 0
    ((orbit, output, config, resume),) = stage.calls
    expected = cameras.orbit(elevation_deg=20.0, radius=2.0, fov_deg=40.0, width=32)
    np.testing.assert_allclose(orbit.cameras.c2w, expected.c2w, atol=1e-6)
    np.testing.assert_allclose(orbit.cameras.K, expected.K, rtol=1e-6)
    assert output == tmp_path / "out"
    assert config == Config("draft", {"seed": 7, "num_interpolated": 0, "num_faces": 500})
    assert resume is False


def test_what_the_quality_decides_is_not_overridden(orbit_folder, tmp_path, stage, capsys):
    run(capsys, "reconstruct", orbit_folder, "-o", tmp_path / "out", "--resume")
    assert stage.calls[0][2] == Config("standard", {"seed": 0})
    assert stage.calls[0][3] is True


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("view 3:\n  shows nothing"), "view 3: shows nothing"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/mesh.glb"),
            "free some space and try again; what is finished is kept, continue with --resume",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out/a"),
            "out/a: Permission denied; check the permissions",
        ),
        (MemoryError(), "out of memory; use --quality draft"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nlong"), "out of memory; use --quality"),
    ],
)
def test_what_a_user_can_change_is_one_line(error, message, orbit_folder, tmp_path, stage, capsys, monkeypatch):
    stage.error = error
    code, stderr = run(capsys, "reconstruct", orbit_folder, "-o", tmp_path / "out")
    assert code == 2
    assert stderr.startswith("hi3d: error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    monkeypatch.setenv("HI3D_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["reconstruct", str(orbit_folder), "-o", str(tmp_path / "out2")])


def test_a_defect_of_the_program_is_not_hidden(orbit_folder, tmp_path, stage):
    stage.error = RuntimeError("internal")
    with pytest.raises(RuntimeError, match="internal"):
        main(["reconstruct", str(orbit_folder), "-o", str(tmp_path / "out")])


def test_interrupting_names_the_way_back(orbit_folder, tmp_path, stage, capsys):
    stage.error = KeyboardInterrupt()
    code, stderr = run(capsys, "reconstruct", orbit_folder, "-o", tmp_path / "out")
    assert code == 130
    assert stderr == "hi3d: interrupted; what is finished is kept, continue with --resume\n"


def test_commands_that_cannot_resume_do_not_promise_it(tmp_path, monkeypatch, capsys):
    for error, code in ((KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device", "a"), 2)):
        monkeypatch.setattr(cli.render.Render, "run", lambda self, error=error: (_ for _ in ()).throw(error))
        found, stderr = run(capsys, "render", "a.glb", "-o", tmp_path)
        assert found == code
        assert "--resume" not in stderr


def test_a_bad_orbit_is_one_line(tmp_path, stage, capsys):
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    code, stderr = run(capsys, "reconstruct", tmp_path / "cut.mp4", "-o", tmp_path / "out")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "truncated, damaged or no video" in stderr
    assert not stage.calls


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    prepare_output(tmp_path / "a/b", resume=False, source=tmp_path / "in.mp4")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "a/b/.DS_Store").touch()
    prepare_output(tmp_path / "a/b", resume=False, source=tmp_path / "in.mp4")
    prepare_output(tmp_path / "c", resume=True, source=tmp_path / "in.mp4")


def test_a_run_is_only_continued_on_request(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "mesh.glb").write_text("precious")
    with pytest.raises(OutputError, match="already holds a run; continue it with --resume"):
        prepare_output(tmp_path, resume=False, source=tmp_path / "in.mp4")
    prepare_output(tmp_path, resume=True, source=tmp_path / "in.mp4")
    assert (tmp_path / "mesh.glb").read_text() == "precious"


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(OutputError, match="not empty; give a new folder"):
        prepare_output(tmp_path, resume=False, source=tmp_path / "in.mp4")
    with pytest.raises(OutputError, match="is a file"):
        prepare_output(tmp_path / "thesis.doc", resume=True, source=tmp_path / "in.mp4")


def test_the_input_is_never_the_output(tmp_path):
    for resume in (False, True):
        with pytest.raises(OutputError, match="is the input"):
            prepare_output(tmp_path / "sub/..", resume=resume, source=tmp_path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch, code):
    def refuse(dir):
        raise OSError(code, os.strerror(code), str(dir))

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"out cannot be written .*; (check|choose|free)"):
        prepare_output(tmp_path / "out", resume=False, source=tmp_path / "in.mp4")


def test_folders_inside_files_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        prepare_output(tmp_path / "file/out", resume=False, source=tmp_path / "in.mp4")


def forget_cache(monkeypatch, **environment):
    """Clears the cache's variables so that what the program sets is undone after the test."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "HI3D_CACHE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    forget_cache(monkeypatch, XDG_CACHE_HOME=tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    compiled_programs.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "hi3d/xla")
    assert (tmp_path / "hi3d/xla").is_dir()


def test_the_users_own_choice_of_cache_wins(tmp_path, monkeypatch):
    forget_cache(monkeypatch, JAX_COMPILATION_CACHE_DIR="mine", HI3D_CACHE=tmp_path)
    compiled_programs.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    forget_cache(monkeypatch, HI3D_CACHE="off")
    compiled_programs.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    forget_cache(monkeypatch, HI3D_CACHE=tmp_path / "file")
    compiled_programs.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "compiled programs are not kept" in capsys.readouterr().err


def test_the_cache_really_is_filled(tmp_path):
    program = (
        "from hi3d_jax.cli.compiled_programs import keep_compiled_programs\nkeep_compiled_programs()\n"
        "import jax\njax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, y: y @ y, x))(jax.numpy.ones((4, 4)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"HI3D_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert list((tmp_path / "xla").iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count mapped pieces of memory")
def test_programs_are_let_go_of_when_they_are_too_many():
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    compiled_programs.let_go_of_programs(most_mapped=1 << 30)
    assert double._cache_size() == 1
    compiled_programs.let_go_of_programs(most_mapped=0)
    assert double._cache_size() == 0


CUBE = """
v -1 -1 -1
v 1 -1 -1
v 1 1 -1
v -1 1 -1
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
f 1 4 3 2
f 5 6 7 8
f 1 2 6 5
f 2 3 7 6
f 3 4 8 7
f 4 1 5 8
"""


def test_a_rendered_orbit_is_one_that_can_be_read(tmp_path, capsys):
    (tmp_path / "cube.obj").write_text(CUBE)
    argv = ["render", tmp_path / "cube.obj", "-o", tmp_path / "orbit", "--size", "48", "--num-views", "6"]
    assert run(capsys, *argv)[0] == 0
    orbit = video.read_orbit(tmp_path / "orbit")
    expected = cameras.orbit(np.arange(6) * 60.0, 20.0, width=48)
    np.testing.assert_allclose(orbit.cameras.c2w, expected.c2w, atol=1e-5)
    assert ((orbit.alphas > 0.5).mean((1, 2)) > 0.2).all()
    code, stderr = run(capsys, *argv)
    assert (code, "not empty" in stderr) == (2, True)


def test_an_archived_object_is_rendered_from_where_one_likes(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "cube.zip", "w") as archive:
        archive.writestr("inner/cube.obj", CUBE)
    argv = ["render", tmp_path / "cube.zip", "-o", tmp_path / "orbit", "--size", "48", "--num-views", "3"]
    assert run(capsys, *argv, "--azimuth-deg", "30")[0] == 0
    expected = cameras.orbit([30.0, 150.0, 270.0], 20.0, width=48)
    np.testing.assert_allclose(video.read_orbit(tmp_path / "orbit").cameras.c2w, expected.c2w, atol=1e-5)


def test_the_example_object_needs_no_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "cube.obj").write_text(CUBE)
    cube = data.load_object(tmp_path / "cube.obj")
    monkeypatch.setattr(data, "example_mesh", lambda: cube)
    assert run(capsys, "render", "example", "-o", tmp_path / "orbit", "--size", "48", "--num-views", "3")[0] == 0
    assert len(video.read_orbit(tmp_path / "orbit")) == 3


def test_render_refuses_what_it_cannot_draw(tmp_path, capsys):
    (tmp_path / "text.glb").write_text("hello")
    (tmp_path / "no_scan").mkdir()
    files = (["text.glb"], ["missing.obj"], ["no_scan"], ["missing.zip"])
    for argv in (*files, ["text.glb", "--size", "1"], ["text.glb", "--num-views", "0"]):
        code, stderr = run(capsys, "render", tmp_path / argv[0], "-o", tmp_path / "out", *argv[1:])
        assert (code, stderr.count("\n")) == (2, 1), stderr


def test_the_doctor_looks_into_model_folders_and_measures(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"networks": {}}')
    recipe = dataclasses.replace(Recipe.paper(1), num_views=2, image_size=48)
    write_random_model(tmp_path / "both/stage1", recipe)
    write_random_model(tmp_path / "half/stage1", recipe)
    weights = tmp_path / "half/stage1/unet/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    folders = [str(tmp_path / name) for name in ("model", "nothing", "both", "half")]
    assert main(["doctor", *folders]) == 0
    told = capsys.readouterr().out
    for title in ("Versions", "Machine", "Devices", "Extras", "Caches", "Models", "Speed"):
        assert f"\n{title}\n" in f"\n{told}"
    assert f"{tmp_path / 'nothing'}" in told
    assert "cpu 0" in told
    assert "TFLOP/s" in told
    assert "tiny: " in told
    assert re.search(r"both: stage 1, paper recipe, 2 views of 48 x 48: unet \d\.\d MB, vae \d\.\d MB", told)
    assert re.search(r"half: stage 1, .*: unet unusable \(.* cannot be read .*; download or write it again\)", told)
    assert re.search(r"both, stage 1, 2 views of 48 pixels: .* seconds \(0\.\d+ TFLOP\)", told)


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 seconds"), (600.0, "10.0 minutes"), (3e5, "3.5 days")])
def test_durations_come_in_the_unit_a_person_would_use(seconds, text):
    assert cli.doctor.duration(seconds) == text
