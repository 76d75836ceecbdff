"""Times sampling steps next to diffusers' StableVideoDiffusionPipeline: python experiments/benchmarks/pipeline.py

Both sides sample the same video with the same weights, conditions, noise and steps, a round of one after a round of the
other in one process: so that whatever else the machine does meets both alike. The U-Net has SVD's structure with the
channels of `--channels` (the default has 70 million parameters); a step is two evaluations of it (guidance), the
preconditioning and the scheduler. Conditions are taken from what diffusers' pipeline hands its U-Net. Printed are
medians over all steps but the first of each round, seconds on the wall and of all cores, their ratios, and how far the
latents at the end differ. diffusers must be installed; on a GPU, torch must see it too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the converters are named from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from converters.rules import plan
from converters.svd_unet import config_from_diffusers, diffusers_rules
from experiments.benchmarks.unet import random_weight
from hi3d_jax import diffusion
from hi3d_jax.models.embeddings import scalar_vector
from hi3d_jax.models.unet import UNet
from hi3d_jax.pretrained import abstract_network, parameters, with_parameters
from hi3d_jax.stages.conditioning import Conditions
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.sampling import denoise_step, noise_levels, sample

GUIDANCE = (1.0, 2.5)


class Stopwatch:
    """Wall and CPU seconds between marks."""

    def __init__(self):
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.last: tuple[float, float] | None = None

    def mark(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.cpu_seconds.append(now[1] - self.last[1])
        self.last = now

    def pause(self) -> None:
        self.last = None


class Diffusers:
    """diffusers' pipeline with its own networks around a random U-Net; `conditions` is what the U-Net was given."""

    def __init__(self, args: argparse.Namespace):
        # Nothing here needs torchvision, and one built for another torch cannot even be imported.
        sys.modules.setdefault("torchvision", None)
        import diffusers
        import torch
        import transformers

        self.args, self.torch = args, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        heads = tuple(max(width // 64, 1) for width in args.channels)
        unet = diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=tuple(args.channels), num_attention_heads=heads, cross_attention_dim=1024
        )
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                parameter.copy_(torch.from_numpy(random_weight(name, tuple(parameter.shape))))
        vae = diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32,) * 4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4
        )
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        tower = transformers.CLIPVisionConfig(**sizes, projection_dim=1024, image_size=224, patch_size=56)
        scheduler = diffusers.EulerDiscreteScheduler(
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_type="continuous",
            timestep_spacing="leading",
            steps_offset=1,
            prediction_type="v_prediction",
        )
        self.unet = unet
        self.pipeline = diffusers.StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=transformers.CLIPVisionModelWithProjection(tower),
            unet=unet,
            scheduler=scheduler,
            feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 224}),
        ).to(self.device, getattr(torch, args.dtype))
        self.pipeline.set_progress_bar_config(disable=True)
        self.conditions: dict[str, np.ndarray] = {}
        unet.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _, inputs: tuple, keywords: dict) -> None:
        named = {"x": inputs[0], "token": keywords["encoder_hidden_states"], "numbers": keywords["added_time_ids"]}
        if not self.conditions:
            self.conditions = {name: value.float().cpu().numpy() for name, value in named.items()}

    def run(self, noise: np.ndarray, watch: Stopwatch) -> np.ndarray:
        """The latents [t h w c] that the whole pipeline ends with; `watch` is marked after every step."""
        torch, args, side = self.torch, self.args, 8 * self.args.latents

        def mark(pipeline, index, timestep, values):
            if self.device == "cuda":
                torch.cuda.synchronize()
            watch.mark()
            return values

        with torch.no_grad():
            made = self.pipeline(
                Image.linear_gradient("L").convert("RGB").resize((side, side)),
                height=side,
                width=side,
                num_frames=args.views,
                num_inference_steps=args.steps,
                min_guidance_scale=GUIDANCE[0],
                max_guidance_scale=GUIDANCE[1],
                latents=torch.from_numpy(np.moveaxis(noise, -1, 2)).to(self.device, getattr(torch, args.dtype)),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                callback_on_step_end=mark,
            ).frames
        watch.pause()
        return np.moveaxis(made[0].float().cpu().numpy(), 1, -1)


def ours(theirs: Diffusers, args: argparse.Namespace) -> Callable[[np.ndarray, Stopwatch], np.ndarray]:
    """Our sampling with the same weights and conditions, once diffusers' pipeline has run."""
    dtype = jnp.dtype(args.dtype)
    config = config_from_diffusers({**theirs.unet.config, "_class_name": type(theirs.unet).__name__})
    abstract = abstract_network(UNet, config, dtype=dtype, param_dtype=dtype)
    weights = {name: random_weight(name, tuple(p.shape)) for name, p in theirs.unet.named_parameters()}
    make = plan(weights, parameters(abstract), diffusers_rules(config)).make
    unet = with_parameters(abstract, lambda path, spec: jnp.asarray(make(path).astype(spec.dtype)))
    graphdef, params = nnx.split(unet)
    given = {name: jnp.asarray(value) for name, value in theirs.conditions.items()}
    conditions = Conditions(given["token"], jnp.moveaxis(given["x"][:, :, 4:], 2, -1), scalar_vector(given["numbers"]))
    levels = noise_levels(Recipe.official(1), args.steps)
    scale = jnp.asarray(diffusion.linear_guidance(args.views, *GUIDANCE))

    def run(noise: np.ndarray, watch: Stopwatch) -> np.ndarray:
        noisy = diffusion.initial_noisy(jnp.asarray(noise), np.asarray([levels[0].sigma]))
        step = lambda noisy, level: denoise_step(graphdef, params, noisy, level, scale, conditions)  # noqa: E731
        made = sample(step, noisy, levels, "ours", progress=False, watch=lambda *_: watch.mark())
        watch.pause()
        return np.asarray(made)[0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs=4, type=int, default=(64, 128, 256, 256))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    for name, default in (("views", 16), ("latents", 16), ("steps", 5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    noise = np.random.default_rng(0).standard_normal((1, args.views, args.latents, args.latents, 4), np.float32)
    theirs = Diffusers(args)
    # A round of each that does not count: compilation, allocation.
    expected = theirs.run(noise, Stopwatch())
    run = ours(theirs, args)
    start = time.perf_counter(), time.process_time()
    made = run(noise, Stopwatch())
    first = time.perf_counter() - start[0], time.process_time() - start[1]
    watches = {"diffusers": Stopwatch(), "ours": Stopwatch()}
    for _ in range(args.rounds):
        theirs.run(noise, watches["diffusers"])
        run(noise, watches["ours"])
    print(f"{jax.devices()[0]}, diffusers on {theirs.device}; {args}")
    print("| side | s per step, median (fastest) | CPU s per step |\n| --- | --- | --- |")
    wall, cpu = (
        {n: statistics.median(getattr(w, what)) for n, w in watches.items()} for what in ("seconds", "cpu_seconds")
    )
    for name, watch in watches.items():
        print(f"| {name} | {wall[name]:.2f} ({min(watch.seconds):.2f}) | {cpu[name]:.2f} |")
    print(
        f"ratio ours / diffusers: {wall['ours'] / wall['diffusers']:.2f} wall, {cpu['ours'] / cpu['diffusers']:.2f} CPU"
    )
    print(f"our first round, compilation included: {first[0]:.1f} s ({first[1]:.1f} CPU s)")
    error = np.abs(made - expected).max() / np.abs(expected).max()
    print(f"latents at the end differ by {error:.1e} of their largest number, {np.abs(expected).max():.2f}")


if __name__ == "__main__":
    main()
