"""Where every array of a run lives: one table from parameters' paths to mesh axes, used for all that has their shape.

Axes of the mesh: `data` splits batches, `fsdp` splits batches and parameters, `tensor` splits parameters by channels
(heads, for attention), `views` splits the views of every orbit and, with `fsdp`, parameters: layers over pixels need
nothing from other views, those over views exchange what they need. A parameter's moments and average are placed as it
is. A dimension that does not divide is an error that names the parameter: nothing is silently kept whole on every
device.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from hi3d_jax.stages.devices import arranged
from hi3d_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor", "views")
ROWS = ("data", "fsdp")

# The first regex that matches a dotted path in full decides how its last axes are split; kernels end in (inputs,
# outputs), convolutions' other axes and stacks of layers come before and stay whole.
RULES: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = (
    # Few inputs (latents and conditions: 8 or 17 channels; pixels: 3) or outputs (4 or 3; one disparity).
    (r"(.*\.)?conv_in\.kernel", (None, "fsdp")),
    (r"(.*\.)?conv_out\.kernel", ("fsdp", None)),
    (r"(.*\.)?(quant_conv|post_quant_conv|time_conv_out|head_out|head_conv\d|stem)\.kernel", ()),
    (r"convs\.0\.kernel|patch_embedding\.kernel", (None, "fsdp")),
    # Into attention and feed-forward, and out of them: heads and hidden channels over `tensor`, without a transpose.
    (r".*\.(to_q|to_k|to_v|proj_in|linear_1|fc1)\.kernel", ("fsdp", "tensor")),
    (r".*\.(to_out|proj_out|linear_2|fc2)\.kernel", ("tensor", "fsdp")),
    (r".*\.lora_down", ("fsdp", None)),
    (r".*\.lora_up", (None, "fsdp")),
    # Convolutions over pixels and over views, and other linear layers: only by their inputs. With outputs over `tensor`
    # and inputs over `fsdp`, XLA (jax 0.10.2) computes wrong gradients of a convolution's input on meshes that have
    # data, fsdp and tensor.
    (r".*\.kernel", (("fsdp", "tensor"), None)),
    # Biases, norms, mix factors, class and position embeddings: small.
    (r".*", ()),
)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The device mesh with axes data, fsdp, tensor and views. Raises `ValueError` where the devices do not fill it."""
    devices = jax.devices() if devices is None else list(devices)
    shape = [config.data, config.fsdp, config.tensor, config.views]
    known = int(np.prod([n for n in shape if n > 0]))
    if shape.count(-1) == 1 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or np.prod(shape) != len(devices):
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor}, mesh.views={config.views} "
            f"do not arrange {len(devices)} devices: their product must be that (one may be -1: all that are left)"
        )
    return arranged(devices, tuple(shape), AXES)


def parameter_spec(path: str, ndim: int) -> P:
    """The table's answer for a parameter of `ndim` axes."""
    last = next(axes for regex, axes in RULES if re.fullmatch(regex, path))
    return P(*(None,) * (ndim - len(last)), *last)


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives. Raises `ValueError` naming it where a dimension does not divide."""
    split = [_mesh_axes(mesh, names) for names in parameter_spec(path, len(shape))]
    for axis, (size, names) in enumerate(zip(shape, split, strict=False)):
        if size % math.prod(mesh.shape[name] for name in names):
            sizes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
            raise ValueError(
                f"{path} {shape}: its axis {axis} does not divide by {sizes}; choose sizes that divide {size}, or "
                "change the rule in training/sharding.py"
            )
    return NamedSharding(mesh, P(*(names or None for names in split)))


def _mesh_axes(mesh: Mesh, names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh over which a rule's axes split."""
    names = (names,) if isinstance(names, str) else names or ()
    # Devices that hold other views of the same orbits hold other parts of the parameters, too.
    views = ("views",) if "fsdp" in names and mesh.shape["views"] > 1 else ()
    return (*names, *views)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a tree of arrays or of shapes: what hangs under a parameter's path follows it, all else is whole."""

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.ndim or not isinstance(keys[-1], jax.tree_util.DictKey):
            return NamedSharding(mesh, P())
        return parameter_sharding(mesh, keys[-1].key, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_shardings(mesh: Mesh, batch: Any, num_parts: int = 1) -> Any:
    """Shardings of a batch, given one of `num_parts` parts: rows over data and fsdp, orbits' views over views.

    Raises `ValueError` where they do not divide.
    """
    rows = {leaf.shape[0] * num_parts for leaf in jax.tree.leaves(batch)}
    parts = rows_parts(mesh)
    if any(count % parts for count in rows):
        raise ValueError(
            f"a batch of {max(rows)} examples does not divide by mesh.data x mesh.fsdp = {parts}: make "
            "data.batch_size a multiple of it, or give fewer devices to these axes"
        )

    def place(leaf: Any) -> NamedSharding:
        views = leaf.shape[1] if leaf.ndim > 2 else 1
        if views > 1 and views % mesh.shape["views"]:
            raise ValueError(
                f"{views} views do not divide by mesh.views={mesh.shape['views']}; let that divide data.num_views"
            )
        return NamedSharding(mesh, P(ROWS, "views") if views > 1 and mesh.shape["views"] > 1 else P(ROWS))

    return jax.tree.map(place, batch)


def rows_parts(mesh: Mesh) -> int:
    """Parts that the examples of a batch are split in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def reading_part(processes: Int[np.ndarray, "rows sharing"], process: int) -> tuple[int, int]:
    """Which part of every batch a process reads, and of how many; processes that share examples read the same part.

    `processes` are the numbers of the processes that the devices belong to, a row for each part of a batch. Raises
    `ValueError` where some processes' devices need some of the same examples, but not all.
    """
    needed = {int(each): tuple(np.flatnonzero((processes == each).any(1))) for each in np.unique(processes)}
    parts = sorted(set(needed.values()))
    if sum(map(len, parts)) != len(processes) or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"{processes.shape[1]} devices share an example, which processes of {(processes == 0).sum()} devices "
            "cannot read by equal parts: let mesh.tensor x mesh.views be a divisor or a multiple of that number"
        )
    return parts.index(needed[process]), len(parts)


def processes_of(mesh: Mesh) -> Int[np.ndarray, "rows sharing"]:
    """The processes that the devices belong to, as `reading_part` takes them."""
    numbers = [device.process_index for device in mesh.devices.flat]
    return np.reshape(numbers, (rows_parts(mesh), -1))
