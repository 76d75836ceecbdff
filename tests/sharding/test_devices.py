"""One picture over eight devices gives what one device gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hi3d_jax.stages.devices import DeviceError, make_device_mesh, placed
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.multiview import multiview
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe

VIEWS = 4
SIZES = {1: 48, 2: 96}


@pytest.fixture(scope="module")
def quick():
    """Compiling in a hurry: for programs that run once."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def model_folder(folder, stage: int):
    recipe = dataclasses.replace(Recipe.official(stage), num_views=VIEWS, image_size=SIZES[stage], num_steps=2)
    write_random_model(folder, recipe)
    return folder


def test_views_and_guidance_are_shared_out():
    mesh = make_device_mesh(16, jax.devices())
    assert dict(mesh.shape) == {"guidance": 2, "views": 4}
    assert dict(make_device_mesh(16, jax.devices()[:1]).shape) == {"guidance": 1, "views": 1}
    with pytest.raises(DeviceError, match=r"6 views .* over 8 devices; use 1, 2, 3, 4, 6, 12"):
        make_device_mesh(6, jax.devices())


def test_an_orbit_over_eight_devices_is_that_of_one(tmp_path, quick):
    folder = model_folder(tmp_path / "stage1", 1)
    image = np.random.default_rng(0).integers(0, 255, (SIZES[1], SIZES[1], 3), np.uint8)
    orbits = []
    for devices in (None, jax.devices()):
        model = StageModel(folder, 1, devices=devices)
        orbits.append(multiview(model, image, progress=False).astype(int))
    assert orbits[0].std() > 1
    # Views are rounded to bytes.
    assert np.abs(orbits[0] - orbits[1]).max() <= 1


@pytest.mark.parametrize(("stage", "spread"), [(1, False), (2, True)])
def test_a_step_over_eight_devices_is_that_of_one(tmp_path, quick, stage, spread):
    folder = model_folder(tmp_path / "model", stage)
    program = StageModel(folder, stage).programs["denoise_step"]
    generator = np.random.default_rng(0)
    params, inputs = jax.tree.map(
        lambda spec: jnp.asarray(0.1 * generator.normal(size=spec.shape), spec.dtype), (program.params, program.inputs)
    )
    inputs = inputs[0], inputs[1]._replace(sigma=jnp.float32(2.0), sigma_next=jnp.float32(1.0)), *inputs[2:]
    expected = program(params, *inputs)
    shared = placed(program, make_device_mesh(VIEWS), spread_parameters=spread)
    params = jax.device_put(params, jax.tree.map(lambda spec: spec.sharding, shared.params))
    split = [p for p in jax.tree.leaves(params) if p.sharding.spec != P()]
    assert bool(split) == spread
    made = shared(params, *inputs)
    scale = np.abs(expected.noisy).max()
    np.testing.assert_allclose(made.noisy, expected.noisy, atol=1e-4 * scale)
    np.testing.assert_allclose(made.denoised, expected.denoised, atol=1e-4 * scale)
    assert made.finite
    assert np.abs(expected.denoised).max() > 0.1
