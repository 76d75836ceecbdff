"""Cameras: SyncDreamer's sixteen, closed forms, invariances, round trips, and files that hold no camera."""

import json
import math

import numpy as np
import pytest

from hi3d_jax import cameras
from hi3d_jax.cameras import CameraError, Cameras


def scattered(count=5, seed=0) -> Cameras:
    """Cameras in random places that look about, each with its own intrinsics."""
    random = np.random.default_rng(seed)
    c2w = np.stack([cameras.look_at(random.normal(size=3) * 2, random.normal(size=3) * 0.2) for _ in range(count)])
    K = np.stack([cameras.intrinsics(fov, 40, 30) for fov in random.uniform(30, 70, count)])
    K[:, 0, 2] += random.uniform(-3, 3, count)
    return Cameras(c2w, K.astype(np.float32), 40, 30)


def test_the_orbit_is_syncdreamers():
    """camera-16.pkl of the benchmark: K, and w2c = [x right, y down, z forward] rows, from its published formula."""
    orbit = cameras.orbit(elevation_deg=30.0, width=256)
    np.testing.assert_allclose(orbit.K, np.tile([[280, 0, 128], [0, 280, 128], [0, 0, 1]], (16, 1, 1)), rtol=1e-6)
    for view, w2c in enumerate(orbit.w2c):
        azimuth, elevation = view * 2 * math.pi / 16, math.radians(30)
        ca, sa, ce, se = math.cos(azimuth), math.sin(azimuth), math.cos(elevation), math.sin(elevation)
        np.testing.assert_allclose(orbit.centres[view], [1.5 * ca * ce, 1.5 * sa * ce, 1.5 * se], atol=1e-6)
        expected = [[-sa, ca, 0, 0], [se * ca, se * sa, -ce, 0], [-ce * ca, -ce * sa, -se, 1.5], [0, 0, 0, 1]]
        np.testing.assert_allclose(w2c, expected, atol=1e-6)


def test_the_orbit_equals_the_benchmarks_own_file(shared):
    official = np.load(shared / "fixtures/official/cameras.npz")
    orbit = cameras.orbit(np.degrees(official["azimuths"]), elevation_deg=30.0, width=256)
    np.testing.assert_allclose(orbit.w2c[:, :3], official["w2c"], atol=2e-6)
    np.testing.assert_allclose(orbit.c2w[:, :3], official["c2w"][:, :3], atol=2e-6)
    np.testing.assert_allclose(orbit.K[0], official["K"], rtol=1e-6)


def test_the_camera_moves_to_its_own_right():
    orbit = cameras.orbit()
    step = orbit.centres[1] - orbit.centres[0]
    assert step @ orbit.c2w[0, :3, 0] > 0
    np.testing.assert_allclose(cameras.azimuths_deg(orbit), np.arange(16) * 22.5, atol=1e-4)


@pytest.mark.parametrize("elevation", [-80.0, 0.0, 45.0])
def test_orbit_cameras_see_the_origin_in_their_centre_and_z_up(elevation):
    orbit = cameras.orbit([0.0, 77.0, 200.0], elevation, radius=2.0, fov_deg=40, width=30, height=20)
    at, depth = cameras.project(np.array([[0, 0, 0], [0, 0, 0.1]], np.float32), orbit)
    np.testing.assert_allclose(at[:, 0], np.tile([15, 10], (3, 1)), atol=1e-4)
    np.testing.assert_allclose(depth[:, 0], 2.0, atol=1e-5)
    np.testing.assert_allclose(at[:, 1, 0], 15, atol=1e-4)
    assert (at[:, 1, 1] < 10).all()
    cameras.check(orbit)


def test_one_elevation_per_view():
    orbit = cameras.orbit([0, 90], [10, -20])
    np.testing.assert_allclose(orbit.centres[:, 2], 1.5 * np.sin(np.radians([10, -20])), atol=1e-6)


def test_field_of_view_spans_the_width():
    K = cameras.intrinsics(90, 200, 100)
    np.testing.assert_allclose(K, [[100, 0, 100], [0, 100, 50], [0, 0, 1]], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"azimuths_deg": []}, "azimuths"),
        ({"azimuths_deg": [0.0, math.nan]}, "azimuths"),
        ({"elevation_deg": 90.0}, "elevation"),
        ({"elevation_deg": math.nan}, "elevation"),
        ({"radius": 0.0}, "radius"),
        ({"radius": math.inf}, "radius"),
        ({"fov_deg": 180.0}, "field of view"),
        ({"fov_deg": math.nan}, "field of view"),
    ],
)
def test_orbits_that_make_no_camera_are_refused(arguments, message):
    with pytest.raises(CameraError, match=message):
        cameras.orbit(**arguments)


def test_looking_straight_up_has_no_roll():
    with pytest.raises(CameraError, match="no defined roll"):
        cameras.look_at((0, 0, 2))
    with pytest.raises(CameraError, match="no defined roll"):
        cameras.look_at((1, 2, 3), (1, 2, 3))
    assert np.isfinite(cameras.look_at((0, 0, 2), up=(0, 1, 0))).all()


def test_pixel_rays_project_back_to_pixel_centres():
    rig = scattered()
    origins, directions = cameras.pixel_rays(rig)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    for view in range(len(rig)):
        points = (origins[view] + 1.7 * directions[view]).reshape(-1, 3)
        at, depth = cameras.project(points, rig[view : view + 1])
        np.testing.assert_allclose(at[0], np.stack([x, y], -1).reshape(-1, 2), atol=1e-3)
        assert (depth > 0).all()


def test_points_behind_a_camera_have_no_positive_depth():
    orbit = cameras.orbit([0.0])
    _, depth = cameras.project(np.array([[3, 0, 0], [1.5, 0, 0]], np.float32), orbit)
    np.testing.assert_allclose(depth, [[-1.5, 0]], atol=1e-6)


def test_turning_world_and_cameras_together_changes_no_picture():
    rig = scattered()
    points = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32) * 0.3
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = turn, (0.3, -0.2, 0.5)
    moved = Cameras((motion @ rig.c2w).astype(np.float32), rig.K, rig.width, rig.height)
    before = cameras.project(points, rig)
    after = cameras.project((points @ turn.T + motion[:3, 3]).astype(np.float32), moved)
    visible = before[1] > 0.2
    np.testing.assert_allclose(after[0][visible], before[0][visible], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(after[1], before[1], atol=1e-4)


def test_resizing_scales_pixel_positions():
    rig, points = scattered(), np.zeros((1, 3), np.float32)
    large = rig.resized(80, 90)
    assert (large.width, large.height) == (80, 90)
    np.testing.assert_allclose(
        cameras.project(points, large)[0], cameras.project(points, rig)[0] * np.float32([2, 3]), rtol=1e-4
    )


def test_choosing_and_joining():
    rig = scattered()
    joined = Cameras.concatenate([rig[:2], rig[np.array([2, 3, 4])]])
    np.testing.assert_array_equal(joined.c2w, rig.c2w)
    np.testing.assert_array_equal(joined.K, rig.K)
    with pytest.raises(CameraError, match="different image sizes"):
        Cameras.concatenate([rig, rig.resized(10, 10)])


def test_new_views_lie_halfway_between_neighbours():
    orbit = cameras.orbit(elevation_deg=20.0, width=64)
    shuffled = orbit[np.random.default_rng(3).permutation(16)]
    between = cameras.between_neighbours(shuffled, 16)
    expected = cameras.orbit((np.arange(16) + 0.5) * 22.5, 20.0, width=64)
    np.testing.assert_allclose(between.c2w, expected.c2w, atol=1e-5)
    np.testing.assert_allclose(between.K, expected.K, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 32])
def test_any_number_of_new_views_is_spread_evenly(count):
    between = cameras.between_neighbours(cameras.orbit(elevation_deg=-10.0), count)
    assert len(between) == count
    gaps = np.diff(np.append(cameras.azimuths_deg(between), cameras.azimuths_deg(between)[0] + 360))
    np.testing.assert_allclose(gaps, 360 / count, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(between.centres, axis=1), 1.5, atol=1e-5)


def test_new_views_keep_looking_where_the_given_ones_look():
    orbit = cameras.orbit(elevation_deg=15.0)
    shift = np.eye(4, dtype=np.float32)
    shift[:3, 3] = (0.4, -0.3, 0.2)
    moved = Cameras(shift @ orbit.c2w, orbit.K, orbit.width, orbit.height)
    np.testing.assert_allclose(cameras.nearest_point_to_axes(moved), shift[:3, 3], atol=1e-5)
    between = cameras.between_neighbours(moved, 16)
    np.testing.assert_allclose(between.c2w, shift @ cameras.between_neighbours(orbit, 16).c2w, atol=1e-5)


def test_axes_conversions():
    c2w = scattered().c2w
    opengl = cameras.opencv_to_opengl(c2w)
    np.testing.assert_array_equal(opengl[:, :3, 0], c2w[:, :3, 0])
    np.testing.assert_array_equal(opengl[:, :3, 1:3], -c2w[:, :3, 1:3])
    np.testing.assert_array_equal(opengl[:, :3, 3], c2w[:, :3, 3])
    np.testing.assert_array_equal(cameras.opengl_to_opencv(opengl), c2w)
    points = np.random.default_rng(4).normal(size=(6, 3))
    np.testing.assert_array_equal(cameras.z_up_to_y_up(cameras.y_up_to_z_up(points)), points)
    np.testing.assert_array_equal(cameras.y_up_to_z_up(np.array([0.0, 1.0, 0.0])), [0, 0, 1])


def test_turning_cameras_to_z_up_turns_them_like_points():
    rig = scattered()
    turned = cameras.turned_to_z_up(rig)
    np.testing.assert_allclose(turned.centres, cameras.y_up_to_z_up(rig.centres), atol=1e-6)
    points = np.random.default_rng(5).normal(size=(9, 3)).astype(np.float32)
    np.testing.assert_allclose(
        cameras.project(cameras.y_up_to_z_up(points), turned)[1], cameras.project(points, rig)[1], atol=1e-5
    )
    cameras.check(turned)


def broken(change):
    rig = scattered(3)
    c2w, K = rig.c2w.copy(), rig.K.copy()
    change(c2w, K)
    return Cameras(c2w, K, rig.width, rig.height)


def scale(c2w, K):
    c2w[1, :3, :3] *= 2


def mirror(c2w, K):
    c2w[1, :3, 0] *= -1


def put_nan(c2w, K):
    c2w[1, 0, 3] = np.nan


def put_infinity(c2w, K):
    K[1, 0, 0] = np.inf


def negate_focal(c2w, K):
    K[1, 0, 0] *= -1


def transpose(c2w, K):
    c2w[1] = c2w[1].T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale, "not orthonormal"),
        (mirror, "right-handed"),
        (put_nan, "NaN"),
        (put_infinity, "infinite"),
        (negate_focal, "focal"),
        (transpose, "last row"),
    ],
)
def test_what_is_no_pinhole_camera_is_named(change, message):
    with pytest.raises(CameraError, match=f"view 1.*{message}"):
        cameras.check(broken(change))


def test_transforms_files_round_trip(tmp_path):
    rig, names = scattered(), [f"views/{view}.png" for view in range(5)]
    cameras.write_transforms(tmp_path / "cameras.json", rig, names)
    read, read_names = cameras.read_transforms(tmp_path / "cameras.json")
    assert read_names == names
    assert (read.width, read.height) == (40, 30)
    np.testing.assert_allclose(read.c2w, rig.c2w, atol=1e-7)
    np.testing.assert_allclose(read.K, rig.K, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["cameras.json"]


def document(**changes):
    frame = {"file_path": "a.png", "transform_matrix": cameras.opencv_to_opengl(cameras.orbit([30.0]).c2w[0]).tolist()}
    fields = {"w": 64, "h": 48, "fl_x": 70.0, "frames": [frame, dict(frame, file_path="b.png")]}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def read(tmp_path, fields, image_size=None):
    (tmp_path / "transforms.json").write_text(json.dumps(fields))
    return cameras.read_transforms(tmp_path / "transforms.json", image_size)


def test_nerfstudios_shared_intrinsics_are_read(tmp_path):
    rig, names = read(tmp_path, document())
    assert names == ["a.png", "b.png"]
    np.testing.assert_allclose(rig.K[1], [[70, 0, 32], [0, 70, 24], [0, 0, 1]])
    np.testing.assert_allclose(rig.centres[0], cameras.orbit([30.0]).centres[0], atol=1e-6)
    rig, _ = read(tmp_path, document(fl_y=71.0, cx=30.0, cy=20.0))
    np.testing.assert_allclose(rig.K[0], [[70, 0, 30], [0, 71, 20], [0, 0, 1]])
    rig, _ = read(tmp_path, document(fl_x=None, camera_angle_x=math.pi / 2))
    np.testing.assert_allclose(rig.K[0], [[32, 0, 32], [0, 32, 24], [0, 0, 1]], atol=1e-5)


def test_blenders_files_without_a_size_ask_the_pictures(tmp_path):
    asked = []
    fields = document(w=None, h=None, fl_x=None, camera_angle_x=math.pi / 2)
    rig, _ = read(tmp_path, fields, lambda name: asked.append(name) or (200, 100))
    assert asked == ["a.png"]
    assert (rig.width, rig.height) == (200, 100)
    assert rig.K[0, 0, 0] == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "frames"),
        ({"frames": []}, "4 x 4"),
        ({"frames": [{"transform_matrix": np.eye(4)[:3].tolist()}] * 4}, "4 x 4"),
        ({"frames": [{"file_path": "a.png"}]}, "transform_matrix"),
        ({"frames": 3}, "frames"),
        ({"w": None}, "needs frames"),
        ({"w": "wide"}, "needs frames"),
        ({"fl_x": None}, "camera_angle_x"),
        ({"fl_x": "long"}, "needs frames"),
        ({"fl_x": math.nan}, "NaN"),
        ({"k1": 0.1}, "distortion k1.*undistort"),
        ({"frames": [{"transform_matrix": (2 * np.eye(4)).tolist()}]}, "not orthonormal"),
        ({"frames": [{"transform_matrix": [[math.nan] * 4] * 4}]}, "NaN"),
    ],
)
def test_files_without_usable_cameras_are_refused(tmp_path, changes, message):
    with pytest.raises(CameraError, match=message) as caught:
        read(tmp_path, document(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_files_that_are_no_json_object_are_refused(tmp_path, content):
    (tmp_path / "cameras.json").write_bytes(content)
    with pytest.raises(CameraError, match=r"not a transforms.json"):
        cameras.read_transforms(tmp_path / "cameras.json")
    with pytest.raises(CameraError, match=r"not a transforms.json"):
        cameras.read_transforms(tmp_path / "missing.json")


def test_positions_are_looked_up_in_the_pixel_they_fall_in():
    image = np.arange(6, dtype=np.float32).reshape(2, 3)
    positions = np.array([[0.0, 0.0], [2.99, 1.01], [1.5, 0.5], [-0.01, 0.5], [3.0, 0.5], [0.5, 2.0]])
    np.testing.assert_array_equal(cameras.at_pixels(image, positions), [0, 5, 1, np.nan, np.nan, np.nan])
