"""Makes good views look like stage 1's: the training input of stage 2 (paper section 4.3; values of HI3D.md section 6).

Two rounds of blur, resizing, noise and JPEG (Real-ESRGAN, Wang et al. 2021), a sinc filter that rings around edges,
and back to the first size. Kernels, noise strengths and qualities are drawn for every view; scales, resize modes, the
kind of noise and the order of the last steps once for the orbit. View 0, the input image, stays clean. The paper's
random masking, which the released code lacks, takes bites out of the object before all else, others in every view, as
stage 1's views disagree about the shape.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8

from hi3d_jax.data.blur_kernels import KernelConfig, blur, draw_final_sinc, draw_kernel
from hi3d_jax.data.interpolate import RESIZE_MODES, interpolate, interpolate_by
from hi3d_jax.data.jpeg import jpeg

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class DegradationRound:
    """One round; `blur` is the share of orbits that are blurred."""

    # Share of orbits that are blurred, and by what.
    blur: float = 1.0
    kernel: KernelConfig = KernelConfig()
    # Shares of enlarging, shrinking, keeping; the scales of both.
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    scale: Range = (0.15, 1.5)
    # Share of orbits with Gaussian noise, the others get Poisson noise.
    gaussian: float = 0.5
    # Standard deviation in units of 1/255, and how strong Poisson noise is against that of light itself.
    gaussian_sigma: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    # Share of views whose noise is the same in all channels.
    grey: float = 0.4
    # Quality of JPEG.
    quality: Range = (30.0, 95.0)


@dataclasses.dataclass(frozen=True)
class Degradation:
    """All choices; the defaults are the released training's (configs/train_realesrnet_x4plus.yml)."""

    # The first round.
    first: DegradationRound = DegradationRound()
    # The second round, in the middle of which the views shrink.
    second: DegradationRound = DegradationRound(
        blur=0.8,
        kernel=KernelConfig(sigma=(0.2, 1.5)),
        resize=(0.3, 0.4, 0.3),
        scale=(0.3, 1.2),
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )
    # How many times smaller the views become before they are enlarged again.
    shrink: int = 4
    # How they are enlarged; empty draws one of `interpolate.RESIZE_MODES` for the orbit.
    enlarge: str = ""
    # Share of views that end with a sinc filter.
    final_sinc: float = 0.8
    # Paint white where the clean views are transparent.
    clean_background: bool = True
    # Share of orbits with random masks, and the largest share of a view that they take.
    masked: float = 0.25
    masked_area: float = 0.15

    def __post_init__(self):
        if self.shrink < 1:
            raise ValueError(f"shrink {self.shrink} must be at least 1")
        if self.enlarge not in ("", *RESIZE_MODES):
            raise ValueError(f"enlarge {self.enlarge!r} must be empty or one of {', '.join(RESIZE_MODES)}")
        for round_ in (self.first, self.second):
            shares = (*round_.resize, *round_.kernel.families)
            if min(shares) < 0 or abs(sum(round_.resize) - 1) > 1e-6 or abs(sum(round_.kernel.families) - 1) > 1e-6:
                raise ValueError(f"shares {round_.resize} and {round_.kernel.families} must be positive and sum to 1")


def degrade_views(
    views: UInt8[np.ndarray, "t h w 4"], rng: np.random.Generator, config: Degradation
) -> UInt8[np.ndarray, "t h w 3"]:
    """The views (sRGB, straight alpha) over white, degraded; view 0 clean. The result follows from `rng` alone."""
    alphas = views[..., 3:].astype(np.float32) / 255
    clean = views[..., :3].astype(np.float32) / 255 * alphas + (1 - alphas)
    orbit = _OrbitDraws(rng, config)
    degraded = [view if index == 0 else _degrade(view, rng, orbit, config) for index, view in enumerate(clean)]
    coarse = _to_bytes(np.stack(degraded))
    if config.clean_background:
        coarse[1:][views[1:, ..., 3] == 0] = 255
    return coarse


class _OrbitDraws:
    """What all views of an orbit share."""

    def __init__(self, rng: np.random.Generator, config: Degradation):
        self.masked = rng.random() < config.masked
        self.rounds = [
            (config.first, *_draw_round(rng, config.first)),
            (config.second, *_draw_round(rng, config.second)),
        ]
        self.sinc_first = rng.random() < 0.5
        self.small_mode, last_mode = (RESIZE_MODES[i] for i in rng.integers(len(RESIZE_MODES), size=2))
        self.last_mode = config.enlarge or last_mode


def _draw_round(rng: np.random.Generator, config: DegradationRound):
    """Whether it blurs, its scale, its resize mode, and whether its noise is Gaussian."""
    direction = rng.choice(3, p=config.resize)
    scale = (rng.uniform(1, config.scale[1]), rng.uniform(config.scale[0], 1), 1.0)[direction]
    return (
        rng.random() < config.blur,
        scale,
        RESIZE_MODES[rng.integers(len(RESIZE_MODES))],
        rng.random() < config.gaussian,
    )


def _degrade(
    view: Float[np.ndarray, "h w 3"], rng: np.random.Generator, orbit: _OrbitDraws, config: Degradation
) -> Float[np.ndarray, "h w 3"]:
    height, width, _ = view.shape
    small = max(height // config.shrink, 1), max(width // config.shrink, 1)
    if orbit.masked:
        view = np.where(random_mask(rng, height, width, config.masked_area)[..., None], np.float32(1), view)
    (first, blurred, scale, mode, gaussian), (second, *again) = orbit.rounds
    view = blur(view, draw_kernel(rng, first.kernel)) if blurred else view
    view = view if scale == 1 else interpolate_by(view, scale, mode)
    view = jpeg(_with_noise(view, rng, first, gaussian), rng.uniform(*first.quality))
    blurred, scale, mode, gaussian = again
    view = blur(view, draw_kernel(rng, second.kernel)) if blurred else view
    view = interpolate(view, max(int(small[0] * scale), 1), max(int(small[1] * scale), 1), mode)
    view = _with_noise(view, rng, second, gaussian)
    kernel, quality = draw_final_sinc(rng, config.final_sinc), rng.uniform(*second.quality)
    if orbit.sinc_first:
        view = blur(interpolate(view, *small, orbit.small_mode), kernel)
        view = jpeg(np.clip(view, 0, 1), quality)
    else:
        view = blur(interpolate(jpeg(view, quality), *small, orbit.small_mode), kernel)
    return interpolate(_to_bytes(view).astype(np.float32) / 255, height, width, orbit.last_mode)


def _with_noise(
    view: Float[np.ndarray, "h w 3"], rng: np.random.Generator, config: DegradationRound, gaussian: bool
) -> Float[np.ndarray, "h w 3"]:
    grey = rng.random() < config.grey
    if gaussian:
        strength = np.float32(rng.uniform(*config.gaussian_sigma) / 255)
        shape = (*view.shape[:2], 1 if grey else 3)
        noise = rng.standard_normal(shape, np.float32) * strength
    else:
        noise = poisson_noise(view, rng, grey) * np.float32(rng.uniform(*config.poisson_scale))
    return np.clip(view + noise, 0, 1)


def poisson_noise(
    view: Float[np.ndarray, "h w c"], rng: np.random.Generator, grey: bool
) -> Float[np.ndarray, "h w c2"]:
    """Photon noise of the 8 bit view: as many photons at full light as it has values, up to a power of two."""
    view = np.clip(view, 0, 1)
    if grey:
        # ITU-R BT.601 as torchvision rounds it.
        view = view @ np.array([[0.2989], [0.587], [0.114]], np.float32)
    levels = _to_bytes(view)
    photons = 2.0 ** np.ceil(np.log2(np.count_nonzero(np.bincount(levels.ravel(), minlength=256))))
    light = levels.astype(np.float32) / 255
    return (rng.poisson(light * photons) / photons).astype(np.float32) - light


def random_mask(rng: np.random.Generator, height: int, width: int, largest: float) -> Bool[np.ndarray, "h w"]:
    """Smooth blobs, some 1/4 of the view wide, that cover a uniformly drawn share of it up to `largest`."""
    field = interpolate(rng.standard_normal((8, 8, 1), np.float32), height, width, "bicubic")[..., 0]
    return field > np.quantile(field, 1 - rng.uniform(0, largest))


def _to_bytes(image: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
