"""Where every array of a run lives: one table from parameters' paths to mesh axes, used for all that has their shape.

Axes of the mesh: `data` splits batches, `fsdp` splits batches and parameters, `tensor` splits parameters by channels
(heads, for attention). A parameter's moments and average are placed as it is. A dimension that does not divide is an
error that names the parameter: nothing is silently kept whole on every device.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hi3d_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The first regex that matches a dotted path in full decides how its last axes are split; kernels end in (inputs,
# outputs), convolutions' other axes and stacks of layers come before and stay whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
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
    # Convolutions over pixels and over views, and other linear layers.
    (r".*\.kernel", ("fsdp", "tensor")),
    # Biases, norms, mix factors, class and position embeddings: small.
    (r".*", ()),
)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The device mesh with axes data, fsdp and tensor. Raises `ValueError` where the devices do not fill it."""
    devices = jax.devices() if devices is None else list(devices)
    shape = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([n for n in shape if n > 0]))
    if shape.count(-1) == 1 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or np.prod(shape) != len(devices):
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} do not arrange "
            f"{len(devices)} devices: their product must be that (one of them may be -1: all that are left)"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_spec(path: str, ndim: int) -> P:
    """The table's answer for a parameter of `ndim` axes."""
    last = next(axes for regex, axes in RULES if re.fullmatch(regex, path))
    return P(*(None,) * (ndim - len(last)), *last)


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives. Raises `ValueError` naming it where a dimension does not divide."""
    spec = parameter_spec(path, len(shape))
    for axis, (size, name) in enumerate(zip(shape, spec, strict=False)):
        if name is not None and size % mesh.shape[name]:
            raise ValueError(
                f"{path} {shape}: its axis {axis} does not divide by mesh.{name}={mesh.shape[name]}; choose a "
                f"mesh.{name} that divides {size}, or change the rule in training/sharding.py"
            )
    return NamedSharding(mesh, spec)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a tree of arrays or of shapes: what hangs under a parameter's path follows it, all else is whole."""

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.ndim or not isinstance(keys[-1], jax.tree_util.DictKey):
            return NamedSharding(mesh, P())
        return parameter_sharding(mesh, keys[-1].key, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_shardings(mesh: Mesh, batch: Any, num_processes: int = 1) -> Any:
    """Shardings of a batch, of which each process has a part: rows over data and fsdp.

    Raises `ValueError` where they do not divide.
    """
    rows = {leaf.shape[0] * num_processes for leaf in jax.tree.leaves(batch)}
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if any(count % parts for count in rows):
        raise ValueError(
            f"a batch of {max(rows)} examples does not divide by mesh.data x mesh.fsdp = {parts}: make "
            "data.batch_size a multiple of it, or give fewer devices to these axes"
        )
    return jax.tree.map(lambda _: NamedSharding(mesh, BATCH), batch)
