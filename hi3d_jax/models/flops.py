"""How much arithmetic a function asks for, counted in its trace: nothing is compiled and nothing computed.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def count_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in a traced function's jaxpr.

    A multiplication and an addition are two. Of the branches of a condition the dearest counts, and a loop of unknown
    length counts once. `jaxpr` is what `jax.make_jaxpr` or `jax.jit(...).trace` gave.
    """
    return sum(_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops(equation: Any) -> int:
    shapes = [variable.aval.shape for variable in (*equation.invars[:2], *equation.outvars[:1])]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            return 2 * math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
        case "conv_general_dilated":
            out_features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            return 2 * math.prod(shapes[2]) * math.prod(shapes[1]) // out_features
        case "scan":
            return equation.params["length"] * count_flops(equation.params["jaxpr"])
        case "cond":
            return max(count_flops(branch) for branch in equation.params["branches"])
    return sum(count_flops(jaxpr) for jaxpr in _jaxprs(equation.params.values()))


def _jaxprs(values: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters, whatever the primitive calls them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
