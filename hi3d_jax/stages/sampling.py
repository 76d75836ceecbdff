"""From noise to latents, one compiled step at a time: guidance, preconditioning and the U-Net in one program.

The step is a function of parameters, state and conditions alone, so that it can be compiled ahead of time and sharded:
the batch axis of the conditions holds both halves of the guidance, the axis after it the views. Noise levels are
arguments: any number of steps, any seed and any model of the same sizes run the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float
from tqdm import tqdm

from hi3d_jax import diffusion
from hi3d_jax.atomic import written_aside
from hi3d_jax.diffusion.sampler import Scalar
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.conditioning import Conditions
from hi3d_jax.stages.recipe import Recipe

STEPS = {"euler": diffusion.euler_step, "heun": diffusion.heun_step}


class NoiseLevel(NamedTuple):
    """What distinguishes one step from the next: where it starts, where it ends, the share of the coarse views."""

    sigma: Scalar
    sigma_next: Scalar
    blend_weight: Scalar


class Blending(NamedTuple):
    """What stage 2 blends its steps with: the coarse views' scaled latents, under the noise sampling starts from."""

    latents: Float[Array, "b t h w c"]
    noise: Float[Array, "b t h w c"]


class Denoised(NamedTuple):
    """The latents after a step, the clean latents it was headed for, and whether all of them are finite."""

    noisy: Float[Array, "b t h w c"]
    denoised: Float[Array, "b t h w c"]
    finite: Bool[Array, ""]


def noise_levels(recipe: Recipe, num_steps: int | None = None) -> list[NoiseLevel]:
    """The steps of the recipe, or `num_steps` of them. Raises `ValueError` for less than one."""
    num_steps = recipe.num_steps if num_steps is None else num_steps
    sigmas = diffusion.karras_sigmas(num_steps, recipe.sigma_min, recipe.sigma_max, recipe.rho)
    weights = np.zeros(num_steps, np.float32)
    if recipe.blend_exponent is not None:
        weights = diffusion.blend_weights(num_steps, recipe.blend_exponent)
    return [NoiseLevel(*level) for level in zip(sigmas, sigmas[1:], weights, strict=False)]


@functools.partial(jax.jit, static_argnames=("graphdef", "sampler", "split_guidance"))
def denoise_step(
    graphdef: Any,
    params: Any,
    noisy: Float[Array, "b t h w c"],
    level: NoiseLevel,
    guidance_scale: Float[Array, " t"],
    conditions: Conditions,
    blending: Blending | None = None,
    *,
    sampler: str = "euler",
    split_guidance: bool = False,
) -> Denoised:
    """One step of sampling; `conditions` are those of twice the videos, from `conditioning.for_guidance`.

    `split_guidance` runs the U-Net for one of them after the other, which halves the memory of its activations.
    """
    unet = nnx.merge(graphdef, params)

    def predict(scaled: Array, c_noise: Array, conditions: Conditions) -> Array:
        inputs = jnp.concatenate([scaled, conditions.concat_latents], axis=-1)
        return unet(inputs, c_noise, conditions.vector, conditions.image_token)

    def network(scaled: Array, c_noise: Array) -> Array:
        rows = scaled, c_noise, conditions
        if not split_guidance:
            return predict(*rows)
        return jax.lax.map(lambda row: predict(*jax.tree.map(lambda x: x[None], row))[0], rows)

    if blending is not None:
        noisy = diffusion.blend(noisy, *blending, level.sigma, level.blend_weight)
    denoise = diffusion.guided(diffusion.precondition(network), guidance_scale)
    stepped = STEPS[sampler](denoise, noisy, level.sigma, level.sigma_next)
    return Denoised(*stepped, jnp.isfinite(stepped.noisy).all())


def sample(
    step: Callable[[Array, NoiseLevel], Denoised],
    noisy: Float[Array, "b t h w c"],
    levels: Sequence[NoiseLevel],
    name: str,
    progress: bool = True,
    kept: Path | None = None,
    watch: Callable[[int, Array], Any] | None = None,
) -> Float[Array, "b t h w c"]:
    """Runs `step` over all noise levels; `name` is that of the stage, for the progress bar and errors.

    The state after each step is kept in the file `kept`, from where an interrupted run goes on. `watch` is shown the
    number of each step done and the latents it was headed for. Raises `StageError` at the first number that is none.
    """
    done, noisy = _read_state(kept, noisy, len(levels))
    bar = tqdm(total=len(levels), initial=done, desc=name, unit="step", disable=None if progress else True)
    with bar:
        for index in range(done, len(levels)):
            stepped = step(noisy, levels[index])
            if not stepped.finite:
                raise StageError(_not_finite(name, index, len(levels), kept))
            noisy = stepped.noisy
            if kept is not None:
                _write_state(kept, index + 1, noisy)
            if watch is not None:
                watch(index + 1, stepped.denoised)
            bar.update()
    return noisy


def _not_finite(name: str, index: int, count: int, kept: Path | None) -> str:
    if kept is None:
        what = "nothing of this stage is kept, all that came before it is"
    else:
        what = f"all that came before this stage is kept, and of it the latents after step {index}, in {kept.name}"
    return (
        f"{name}: NaN or infinite numbers came out of the U-Net at step {index + 1} of {count}; {what}. Compute in "
        "float32 (--dtype float32) or try another --seed; if it stays, the weights are damaged"
    )


def _write_state(path: Path, done: int, noisy: Array) -> None:
    with written_aside(path) as aside:
        np.savez(aside, done=done, noisy=np.asarray(noisy))


def _read_state(path: Path | None, noisy: Array, count: int) -> tuple[int, Array]:
    """Steps done and the latents after them, from the file of an interrupted run, or the start."""
    if path is None or not path.exists():
        return 0, noisy
    try:
        with np.load(path, allow_pickle=False) as file:
            done, before = int(file["done"]), file["noisy"]
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise StageError(f"{path} is damaged ({error}); delete it and continue with --resume") from error
    if before.shape != noisy.shape or done > count:
        raise StageError(f"{path} belongs to other settings; delete it and continue with --resume")
    return done, jnp.asarray(before)
