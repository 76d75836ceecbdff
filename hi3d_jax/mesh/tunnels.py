"""Closing tunnels that nobody looks through.

A fitted surface that is wrong in a place that few views see often has bent, narrow holes right through the body there.
A real hole shows the background to some view, so that the masks carve it; a tunnel that runs within what the masks
allow is an error of the fit, and the little matter that closes it is all that is changed: pits and grooves stay.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from skimage.measure import euler_number

# Half the widths of tunnels that are looked for, in cells, one after another: narrow ones are closed with least matter.
HALF_WIDTHS = (2.0, 4.0, 8.0)
# Cells around a plug in which its rounded surface replaces the values.
BLEND = 2


def close_tunnels(
    values: Float[np.ndarray, "x y z"],
    cell: float,
    allowed: Callable[[Int[np.ndarray, "n 3"]], Bool[np.ndarray, " n"]],
) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]]:
    """Signed distances (negative inside, `cell` apart) with plugs in their tunnels, and where they were changed.

    `allowed` says which grid corners, given by index, may be filled. The matter added is what a morphological closing
    adds, and of that only the pieces that raise the body's Euler number: those that close a tunnel.
    """
    plugs = _plugs(values < 0, allowed)
    changed = ndimage.binary_dilation(plugs, iterations=BLEND) if plugs.any() else plugs
    if not plugs.any():
        return values, changed
    window = _window(changed, BLEND + 1)
    solid = (values[window] < 0) | plugs[window]
    distance = ndimage.distance_transform_edt(~solid) - ndimage.distance_transform_edt(solid)
    rounded = ndimage.gaussian_filter(distance, 1.0).astype(np.float32) * np.float32(cell)
    result = values.copy()
    result[window] = np.where(changed[window], np.minimum(values[window], rounded), values[window])
    return result, changed


def _plugs(inside: Bool[np.ndarray, "x y z"], allowed) -> Bool[np.ndarray, "x y z"]:
    plugs = np.zeros_like(inside)
    if not inside.any():
        return plugs
    window = _window(inside, int(max(HALF_WIDTHS)) + 2)
    corner = np.array([part.start for part in window])
    body, added = inside[window].copy(), np.zeros_like(inside[window])
    for half_width in HALF_WIDTHS:
        gaps = np.argwhere(_closing(body, half_width) & ~body)
        free = gaps[allowed(gaps + corner)] if len(gaps) else gaps
        candidates = np.zeros_like(body)
        candidates[tuple(free.T)] = True
        pieces, _ = ndimage.label(candidates, np.ones((3, 3, 3)))
        for number, box in enumerate(ndimage.find_objects(pieces), start=1):
            around = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
            piece = pieces[around] == number
            # The Euler number counts bodies, less tunnels, plus cavities; it is a sum over neighbourhoods, so that its
            # change is known from the piece's surroundings.
            if euler_number(body[around] | piece, 3) > euler_number(body[around], 3):
                body[around] |= piece
                added[around] |= piece
    plugs[window] = added
    return plugs


def _closing(body: Bool[np.ndarray, "x y z"], radius: float) -> Bool[np.ndarray, "x y z"]:
    grown = ndimage.distance_transform_edt(~body) <= radius
    # What lies beyond the window is empty, and far from the body.
    return ndimage.distance_transform_edt(np.pad(grown, 1))[1:-1, 1:-1, 1:-1] > radius


def _window(where: Bool[np.ndarray, "x y z"], margin: int) -> tuple[slice, ...]:
    """The box around the true cells, wider by `margin` on all sides as far as there are cells."""
    found = ndimage.find_objects(where.astype(np.int8))[0]
    return tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in found)
