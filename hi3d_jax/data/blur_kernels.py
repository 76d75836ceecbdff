"""Blur kernels of the high-order degradation model (Real-ESRGAN, Wang et al. 2021, section 3; HI3D.md section 6).

Six families of bell shapes over the quadratic form d = x^T S^-1 x, S the covariance: Gaussian exp(-d/2), generalised
Gaussian exp(-d^beta / 2), plateau 1 / (1 + d^beta), each isotropic or not; and the circular low-pass (sinc), whose
side lobes ring around edges. Every kernel sums to 1.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy import fft, special

KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
LARGEST_KERNEL = 21
FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """How a kernel is drawn."""

    # Share of kernels that are a sinc.
    sinc: float = 0.1
    # Shares of the six families among the others, in the order of FAMILIES.
    families: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    # Standard deviations along the two axes in pixels.
    sigma: tuple[float, float] = (0.2, 3.0)
    # Exponents: half of the draws below 1, half above.
    generalized_beta: tuple[float, float] = (0.5, 4.0)
    plateau_beta: tuple[float, float] = (1.0, 2.0)


def bell(
    family: str, size: int, sigma_x: float, sigma_y: float, angle: float, beta: float = 1.0
) -> Float[np.ndarray, "size size"]:
    """A kernel of one of the `FAMILIES`; `angle` (radians) turns the axes; isotropic ones use `sigma_x` alone."""
    if family.endswith("aniso"):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        covariance = turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T
    else:
        covariance = np.diag([sigma_x**2, sigma_x**2])
    x, y = np.meshgrid(*2 * [np.arange(size, dtype=np.float64) - size // 2])
    points = np.stack([x, y], axis=-1)
    form = np.einsum("hwi,ij,hwj->hw", points, np.linalg.inv(covariance), points)
    if family.startswith("plateau"):
        kernel = 1 / (form**beta + 1)
    else:
        kernel = np.exp(-0.5 * (form**beta if family.startswith("generalized") else form))
    return kernel / kernel.sum()


def sinc(cutoff: float, size: int) -> Float[np.ndarray, "size size"]:
    """The circular low-pass with a cutoff in radians per pixel (at most pi)."""
    x, y = np.meshgrid(*2 * [np.arange(size) - (size - 1) / 2])
    radius = np.hypot(x, y)
    safe = np.maximum(radius, 1e-9)
    kernel = np.where(radius > 0, cutoff * special.j1(cutoff * safe) / (2 * np.pi * safe), cutoff**2 / (4 * np.pi))
    return kernel / kernel.sum()


def padded(kernel: Float[np.ndarray, "k k"], size: int = LARGEST_KERNEL) -> Float[np.ndarray, "size size"]:
    """The kernel amid zeros."""
    return np.pad(kernel, (size - len(kernel)) // 2)


def draw_kernel(rng: np.random.Generator, config: KernelConfig) -> Float[np.ndarray, "21 21"]:
    """A random kernel for one of the two rounds of blur."""
    size = int(rng.choice(KERNEL_SIZES))
    if rng.random() < config.sinc:
        return padded(sinc(rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi), size))
    family = FAMILIES[rng.choice(len(FAMILIES), p=config.families)]
    betas = config.plateau_beta if family.startswith("plateau") else config.generalized_beta
    beta = rng.uniform(betas[0], 1) if rng.random() < 0.5 else rng.uniform(1, betas[1])
    sigma_x, sigma_y = rng.uniform(*config.sigma, 2)
    return padded(bell(family, size, sigma_x, sigma_y, rng.uniform(-np.pi, np.pi), beta))


def draw_final_sinc(rng: np.random.Generator, share: float) -> Float[np.ndarray, "21 21"]:
    """The sinc that ends the second round, or no change."""
    if rng.random() < share:
        return padded(sinc(rng.uniform(np.pi / 3, np.pi), int(rng.choice(KERNEL_SIZES))))
    return padded(np.ones((1, 1)))


def blur(image: Float[np.ndarray, "h w c"], kernel: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "h w c"]:
    """The image correlated with the kernel, mirrored at its edges."""
    if kernel[len(kernel) // 2, len(kernel) // 2] == 1:
        return image
    kernel = _trimmed(kernel)
    reach = len(kernel) // 2
    mirrored = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width, _ = image.shape
    shape = [fft.next_fast_len(side, real=True) for side in mirrored.shape[:2]]
    spectrum = fft.rfft2(mirrored.astype(np.float32, copy=False), shape, axes=(0, 1))
    spectrum *= fft.rfft2(kernel[::-1, ::-1].astype(np.float32), shape)[..., None]
    blurred = fft.irfft2(spectrum, shape, axes=(0, 1), overwrite_x=True)
    return blurred[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def _trimmed(kernel: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k2 k2"]:
    """The kernel without its border of zeros."""
    used = np.argwhere(kernel != 0)
    margin = int(min(used.min(), len(kernel) - 1 - used.max()))
    return kernel[margin : len(kernel) - margin, margin : len(kernel) - margin]
