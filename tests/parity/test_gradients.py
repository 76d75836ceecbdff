"""The gradients of the training loss against the official ones: seven whole, the lengths of all."""

import jax
import jax.numpy as jnp
import numpy as np
from filled import FIXTURES, nhwc
from recorded import FAST_COMPILE, UNETS, recorded_unet, relative_error

from converters.rules import export
from converters.svd_unet import sgm_rules
from hi3d_jax import diffusion
from hi3d_jax.models.unet import UNet
from hi3d_jax.pretrained import abstract_network, parameters, with_parameters
from hi3d_jax.stages.conditioning import Conditions
from hi3d_jax.training.tasks.stage import denoiser


def test_the_gradients_of_the_training_loss_are_the_official_ones():
    stored = np.load(FIXTURES / "loss_stage1.npz")
    config, abstract = UNETS["unet_stage1"], abstract_network(UNet, UNETS["unet_stage1"])
    latents, noise, concat = (
        jnp.asarray(nhwc(stored[key])).reshape(2, 4, 16, 8, -1) for key in ("z", "noise", "concat")
    )
    token, vector, sigma = (jnp.asarray(stored[key]) for key in ("crossattn", "vector", "sigma"))

    def loss(params):
        unet = with_parameters(abstract, lambda path, _: params[path])
        return diffusion.edm_loss(denoiser(unet, Conditions(token, concat, vector)), latents, noise, sigma).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
    value, grads = value_and_grad(parameters(recorded_unet("unet_stage1")))
    np.testing.assert_allclose(value, stored["loss"].mean(), rtol=1e-5)
    got = export(jax.tree.map(np.asarray, grads), sgm_rules(config))
    recorded = dict(np.load(FIXTURES / "loss_gradients.npz"))
    lengths = dict(zip(sorted(got), recorded.pop("norms"), strict=True))
    # Of the largest gradient's rows every eighth is recorded.
    whole = {key: got[key][::8] if key == "label_emb.0.0.weight" else got[key] for key in got}
    errors = {key: relative_error(whole[key.removeprefix("grad:")], recorded[key]) for key in recorded}
    assert len(errors) == 7
    # Measured: 7.7e-5, in a temporal convolution's kernel; gradients pass thirty norms.
    assert max(errors.values()) < 1e-4, errors
    # Gradients before norms cancel to almost nothing, and what is left of them is rounding. Measured: 1.6e-4 in the
    # weight of one embedding layer (output_blocks.1.0), 4.1e-5 at most in the other 1425. In float64 ours change by
    # 3e-6 at most and that one is as far off: it is not ours that are rounded.
    least = 1e-2 * max(lengths.values())
    off = {key: abs(np.linalg.norm(got[key]) - length) / max(length, least) for key, length in lengths.items()}
    assert max(off.values()) < 2e-4, {key: value for key, value in off.items() if value > 1e-4}
    assert sum(value > 1e-4 for value in off.values()) <= 1
