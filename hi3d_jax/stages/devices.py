"""One picture over several devices: the halves of the guidance and the views of the orbit are shared out.

A device mesh has the axes `guidance` (the U-Net without and with conditions) and `views`. Placing a program's
arguments is all there is to it: XLA splits the program accordingly and exchanges what views tell each other (temporal
attention and convolution, norms over the clip). Parameters are whole on every device, or spread over all of them and
gathered layer by layer where they would not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hi3d_jax.stages.conditioning import Conditions
from hi3d_jax.stages.programs import Chunking, Program, make_programs
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.sampling import Blending, NoiseLevel, denoise_step

AXES = ("guidance", "views")


class DeviceError(ValueError):
    """Devices that the work cannot be shared out over; the text says how many it can."""


def make_device_mesh(num_views: int, devices: Sequence[Any] | None = None) -> Mesh:
    """All `devices` (those there are) as a mesh for orbits of `num_views`.

    An even number gives each half of the guidance its own devices. Raises `DeviceError` where the views do not divide.
    """
    devices = jax.devices() if devices is None else list(devices)
    guidance = 2 if len(devices) % 2 == 0 else 1
    if num_views % (len(devices) // guidance):
        possible = sorted({n * half for n in range(1, num_views + 1) if num_views % n == 0 for half in (1, 2)})
        raise DeviceError(
            f"{num_views} views cannot be shared out over {len(devices)} devices; use {', '.join(map(str, possible))}"
        )
    return arranged(devices, (guidance, len(devices) // guidance), AXES)


def arranged(devices: Sequence[Any], shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """The devices as a mesh whose axes XLA divides work over, neighbours together where the hardware has any.

    Unlike `jax.make_mesh` it lets axes share one of the hardware's: 16 x 4 on 8 x 8 chips, or 2 x 16 on 4 x 8.
    """
    placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))


def shared_programs(
    recipe: Recipe,
    networks: Mapping[str, nnx.Module],
    chunking: Chunking,
    mesh: Mesh | None,
    *,
    spread_parameters: bool = False,
) -> dict[str, Program]:
    """`make_programs`, placed on the devices of `mesh` (None: on one), each of which sees at least one view."""
    if mesh is None:
        return make_programs(recipe, networks, chunking)
    views = (max(at_once, mesh.size) for at_once in (chunking.encode_views, chunking.decode_views))
    programs = make_programs(recipe, networks, Chunking(*views, chunking.split_guidance))
    return {name: placed(each, mesh, spread_parameters=spread_parameters) for name, each in programs.items()}


def placed(program: Program, mesh: Mesh, *, spread_parameters: bool = False) -> Program:
    """The program with a sharding on everything that it is called with; see `parameter_sharding`."""
    axes = _step_axes(program.inputs) if program.function is denoise_step else _pictures_axes(program.inputs, mesh)
    inputs = jax.tree.map(
        lambda axes, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=NamedSharding(mesh, axes)),
        axes,
        program.inputs,
        is_leaf=lambda node: isinstance(node, P),
    )
    place = parameter_sharding(mesh, spread_parameters)
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place("", spec)), program.params
    )
    return dataclasses.replace(program, params=params, inputs=inputs)


def parameter_sharding(mesh: Mesh, spread: bool = False) -> Callable[[str, jax.ShapeDtypeStruct], NamedSharding]:
    """Where a parameter lives, as a function of its path and shape: whole on every device.

    `spread` keeps a part of each on each device: it is split along its last axis that divides. What is small (biases,
    norms) stays whole.
    """

    def place(path: str, spec: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(spec.shape) if size % mesh.size == 0]
        if not spread or len(spec.shape) < 2 or not divisible:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * divisible[-1], AXES))

    return place


def _pictures_axes(inputs: tuple[Any, ...], mesh: Mesh) -> tuple[P]:
    """Of an encoder's or the decoder's pictures; fewer than devices, such as the input image, are seen by all."""
    return (P(AXES) if inputs[0].shape[0] % mesh.size == 0 else P(),)


def _step_axes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of `sampling.denoise_step`'s inputs."""
    latents, both = P(None, "views"), P("guidance", "views")
    blending = None if inputs[-1] is None else Blending(latents, latents)
    return latents, NoiseLevel(P(), P(), P()), P("views"), Conditions(P("guidance"), both, P("guidance")), blending
