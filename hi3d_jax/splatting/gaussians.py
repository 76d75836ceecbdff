"""A scene as a fixed number of anisotropic 3D Gaussians (Kerbl et al. 2023, section 4; Hi3D section 4.4, eq. 7).

The five arrays hold unconstrained numbers, so that an optimiser may move them freely; the properties apply the
activations of the original: scales = exp(log_scales), opacities = sigmoid(opacity_logits), quaternions are normalised
where they are used. World units and axes are those of the cameras (z up).
"""

from __future__ import annotations

import dataclasses

import jax
from jax import Array
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians:
    """`n` Gaussians; a pytree, so gradients and optimiser moments have the same fields.

    `means`: centres in the world. `quats`: rotations (w, x, y, z), any length above zero. `log_scales`: logarithm of
    the standard deviation along each rotated axis, world units. `opacity_logits`: opacity before the sigmoid.
    `sh`: spherical harmonics of the colour seen from each direction, `k` = (degree + 1)² coefficients for sRGB red,
    green and blue; 0 means mid-grey.
    """

    means: Float[Array, "n 3"]
    quats: Float[Array, "n 4"]
    log_scales: Float[Array, "n 3"]
    opacity_logits: Float[Array, " n"]
    sh: Float[Array, "n k 3"]

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def scales(self) -> Float[Array, "n 3"]:
        """Standard deviations along the rotated axes, world units."""
        return jax.numpy.exp(self.log_scales)

    @property
    def opacities(self) -> Float[Array, " n"]:
        """Opacity at the centre, in (0, 1)."""
        return jax.nn.sigmoid(self.opacity_logits)

    def __getitem__(self, index) -> Gaussians:
        """The chosen Gaussians, by slice, mask or integer array."""
        return jax.tree.map(lambda values: values[index], self)
