"""A model folder at work: its recipe, its programs, and its networks, loaded when needed and let go after."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, UInt8
from tqdm import tqdm

from hi3d_jax import diffusion
from hi3d_jax.images import to_bytes
from hi3d_jax.models.resampling import square_means
from hi3d_jax.models.vae import Posterior
from hi3d_jax.pretrained import abstract_network, check_weights, from_pretrained, read_networks, weights_folder
from hi3d_jax.stages import conditioning
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.conditioning import ConditionParts, Encoders
from hi3d_jax.stages.devices import make_device_mesh, parameter_sharding, shared_programs
from hi3d_jax.stages.memory import give_back, plan_memory
from hi3d_jax.stages.programs import (
    ONE_BY_ONE,
    PREVIEW_SHRINK,
    PREVIEW_VIEWS,
    Chunking,
    Program,
    concat_channels,
    vector_dim,
)
from hi3d_jax.stages.recipe import Recipe, RecipeError
from hi3d_jax.stages.sampling import Blending, noise_levels, sample

# Of each file, what is read from its beginning and its end to tell models apart.
END_BYTES = 2**16
# Is shown the number of each step done and the latents [t h w c] it was headed for.
Watch = Callable[[int, Array], None]


def default_dtype() -> Any:
    """What networks compute in: bfloat16 where there are units for it, else float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


class StageModel:
    """The model of one stage. Raises `PretrainedError` or `RecipeError` for a folder that holds no such model.

    `stage` is the one that the folder must be of. `keep_loaded` keeps networks on their device once they were needed.
    Each orbit is shared out over all `devices`, if any are given (else it is made on the default one). `memory_budget`,
    bytes on each device, chooses `chunking`, and `dtype` where none is given, so that a run stays below it;
    `memory_plan` says how. Raises `DeviceError` where devices do not divide the views, `MemoryBudgetError` where
    nothing fits.
    """

    def __init__(
        self,
        source: str | Path,
        stage: Literal[1, 2] | None = None,
        *,
        dtype: Any = None,
        chunking: Chunking = ONE_BY_ONE,
        keep_loaded: bool = False,
        devices: Sequence[jax.Device] | None = None,
        memory_budget: int | None = None,
    ):
        self.source = source
        self.recipe = Recipe.of(source, stage)
        self.dtype = default_dtype() if dtype is None else dtype
        self.keep_loaded = keep_loaded
        described = read_networks(source)
        wanted = needed_networks(self.recipe)
        if missing := [name for name in wanted if name not in described]:
            raise RecipeError(
                f"{source} lacks the network {', '.join(missing)}, which its recipe needs; convert it with the others "
                f"(it has {', '.join(described) or 'none'})"
            )
        names = [*wanted, "conditioning_vae"] if "conditioning_vae" in described else wanted
        self.networks = tuple(names)
        sizes = {name: described[name] for name in names}
        check_fit(source, self.recipe, {name: config for name, (_, config) in sizes.items()})
        device_mesh = None if devices is None else make_device_mesh(self.recipe.num_views, devices)
        self.memory_plan = None
        if memory_budget is not None:
            dtypes = [self.dtype] if dtype is not None else list(dict.fromkeys([self.dtype, jnp.bfloat16]))
            self.memory_plan = plan_memory(self.recipe, sizes, memory_budget, dtypes, device_mesh)
            self.dtype, chunking = self.memory_plan.dtype, self.memory_plan.chunking
        networks = {
            name: abstract_network(*size, dtype=self.dtype, param_dtype=self.dtype) for name, size in sizes.items()
        }
        self.scaling_factor = networks["vae"].config.scaling_factor
        self.programs = shared_programs(self.recipe, networks, chunking, device_mesh)
        self.sharding = None if device_mesh is None else parameter_sharding(device_mesh)
        self._kept: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """For progress bars and errors."""
        return f"stage {self.recipe.stage}"

    def check_weights(self) -> None:
        """Raises `PretrainedError` where weights are missing, cut short or do not fit, before anything is computed."""
        check_weights(self.source, self.networks, self.dtype)

    def fingerprint(self) -> str | None:
        """Tells models apart by names, sizes and both ends of their weights' files; None where they are not local."""
        if not Path(self.source).is_dir():
            return None
        digest = hashlib.sha256()
        for name in sorted(self.networks):
            for path in sorted(weights_folder(self.source, name).glob("*.safetensors")):
                size = path.stat().st_size
                digest.update(f"{name}/{path.name} {size}".encode())
                with path.open("rb") as file:
                    digest.update(file.read(END_BYTES))
                    file.seek(max(size - END_BYTES, 0))
                    digest.update(file.read())
        return digest.hexdigest()

    @contextlib.contextmanager
    def loaded(self, program: Program) -> Iterator[Callable[..., Any]]:
        """`program` with its networks' parameters on the device while the context lasts."""
        fresh = [name for name in program.networks if name not in self._kept]
        for name in fresh:
            self._kept[name] = nnx.split(self._load(name))[1]
        params = tuple(self._kept[name] for name in program.networks)
        # Several networks were split as one tuple.
        joined = (
            params[0]
            if len(params) == 1
            else jax.tree.unflatten(jax.tree.structure(program.params), jax.tree.leaves(params))
        )
        try:
            yield functools.partial(program, joined)
        finally:
            if not self.keep_loaded:
                for name in fresh:
                    for array in jax.tree.leaves(self._kept.pop(name)):
                        array.delete()
                give_back()

    def _load(self, name: str) -> nnx.Module:
        return from_pretrained(self.source, name, dtype=self.dtype, sharding=self.sharding)

    def run(self, name: str, images: Float[Array | np.ndarray, "n h w c"], progress: bool = False) -> Any:
        """The program `name` over all pictures, as many at a time as it was made for."""
        program = self.programs[name]
        count = program.inputs[0].shape[0]
        several = progress and len(images) > count
        words = f"{self.name}, {name.replace('_', ' ')}"
        starts = tqdm(range(0, len(images), count), words, leave=False, disable=None if several else True)
        with self.loaded(program) as call:
            made = [jax.block_until_ready(call(jnp.asarray(images[i : i + count]))) for i in starts]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)

    def encoders(self, progress: bool = False) -> Encoders:
        """The networks that conditions come from, each loaded for as long as it is called."""
        run = functools.partial(self.run, progress=progress)
        return Encoders(
            image_token=functools.partial(run, "image_token"),
            latents=lambda images: run("conditioning_latents", images).mean,
            depth=functools.partial(run, "depth") if "depth" in self.programs else None,
            aesthetic=functools.partial(run, "aesthetic") if "aesthetic" in self.programs else None,
        )

    def sample(
        self,
        parts: ConditionParts,
        noise: Float[Array, "1 t h w c"],
        coarse: Float[Array, "1 t h w c"] | None = None,
        *,
        num_steps: int | None = None,
        progress: bool = True,
        kept: Path | None = None,
        watch: Watch | None = None,
    ) -> Float[Array, "t h w c"]:
        """Scaled latents of one video from its conditions; `coarse`: the scaled latents that stage 2 blends with.

        See `sampling.sample` for `progress`, `kept` and `watch`. Raises `StageError`.
        """
        recipe = self.recipe
        levels = noise_levels(recipe, num_steps)
        scale = jnp.asarray(diffusion.linear_guidance(recipe.num_views, *recipe.guidance))
        conditions = conditioning.for_guidance(recipe, parts)
        blending = None if recipe.blend_exponent is None else Blending(coarse, noise)
        noisy = diffusion.initial_noisy(noise, np.asarray([level.sigma for level in levels]))
        show = None if watch is None else lambda done, denoised: watch(done, denoised[0])
        with self.loaded(self.programs["denoise_step"]) as call:
            step = lambda noisy, level: call(noisy, level, scale, conditions, blending)  # noqa: E731
            return sample(step, noisy, levels, self.name, progress, kept, show)[0]

    def decode(self, latents: Float[Array, "t h w c"], progress: bool = False) -> UInt8[np.ndarray, "t h2 w2 3"]:
        """The views of scaled latents. Raises `StageError` where they are not finite."""
        return self._bytes(self.run("decode", latents, progress))

    def preview(self, latents: Float[Array, "t h w c"]) -> UInt8[np.ndarray, "n h2 w2 3"]:
        """A few views, small."""
        views = latents[:: max(len(latents) // PREVIEW_VIEWS, 1)][:PREVIEW_VIEWS]
        by = PREVIEW_SHRINK if min(views.shape[1:3]) >= PREVIEW_SHRINK else 1
        return self._bytes(self.run("preview", square_means(views, by)))

    def _bytes(self, views: Array) -> UInt8[np.ndarray, "t h w 3"]:
        views = np.asarray(views)
        if not np.isfinite(views).all():
            raise StageError(
                f"{self.name}: NaN or infinite numbers came out of the decoder; all that came before this stage is "
                "kept. Compute in float32 (--dtype float32) or try another --seed; if it stays, the weights are damaged"
            )
        return to_bytes(views)


def needed_networks(recipe: Recipe) -> list[str]:
    """Names of the networks that a model with this recipe consists of."""
    names = ["unet", "vae", "image_encoder"]
    if "depth" in recipe.concat:
        names.append("depth")
    if "aesthetic" in recipe.vector:
        names += ["aesthetic_encoder", "aesthetic_predictor"]
    return names


def check_fit(source: str | Path, recipe: Recipe, configs: dict[str, Any]) -> None:
    """Raises `RecipeError` where networks do not have the sizes that the recipe and each other ask for."""
    unet, vae = configs["unet"], configs["vae"]
    expected = {
        "in_channels": unet.out_channels + concat_channels(recipe, vae.latent_channels),
        "out_channels": vae.latent_channels,
        "vector_dim": vector_dim(recipe),
        "context_dim": configs["image_encoder"].projection_dim,
    }
    for field, value in expected.items():
        if getattr(unet, field) != value:
            raise RecipeError(
                f"{source}: the U-Net has {field} {getattr(unet, field)}, but its recipe (vector "
                f"{', '.join(recipe.vector)}; concat {', '.join(recipe.concat)}) and the other networks ask for {value}"
            )
    factor = vae.downsampling * 2 ** (len(unet.block_channels) - 1)
    if recipe.image_size % factor:
        raise RecipeError(f"{source}: image_size {recipe.image_size} must be a multiple of {factor} for its networks")


def random_key(seed: int, variant: int, stage: int) -> Array:
    """The key of one stage of one variant: it does not depend on how many variants are made."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), variant), stage)


def draw_latents(posterior: Posterior, key: Array, scaling_factor: float) -> Float[Array, "1 t h w c"]:
    """Scaled latents drawn from an autoencoder's posterior."""
    return posterior.sample(key)[None] * scaling_factor
