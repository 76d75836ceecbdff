"""The aesthetic predictor that conditions stage 1: LAION's linear head on OpenAI CLIP ViT-L/14 (HI3D.md section 2).

Undocumented in the paper, present in the released checkpoint: the score enters the U-Net's added vector in the slot
that SVD used for the frame rate (`hi3d_jax.models.embeddings.aesthetic_vector`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.clip import normalise_for_clip
from hi3d_jax.models.resampling import resize_bilinear

# The embedder squeezes any frame to this height and width, then keeps the middle columns.
RESIZED = (224, 384)
CROPPED = slice(80, 304)


@dataclasses.dataclass(frozen=True)
class AestheticConfig:
    """Widths from the CLIP embedding to the score."""

    widths: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)

    @classmethod
    def laion(cls) -> "AestheticConfig":
        """sac+logos+ava1-l14-linearMSE, the head inside first_stage.pt."""
        return cls()


class AestheticPredictor(nnx.Module):
    """A chain of linear layers with nothing in between: the released head has dropouts there and no activations."""

    def __init__(
        self, config: AestheticConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        self.config = config
        self.layers = nnx.List(
            nnx.Linear(before, after, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for before, after in zip(config.widths, config.widths[1:], strict=False)
        )

    def __call__(self, embedding: Float[Array, "b c"]) -> Float[Array, " b"]:
        """The score (about 5 for ordinary pictures) of unnormalised CLIP embeddings."""
        embedding = embedding.astype(jnp.float32)
        x = embedding * jax.lax.rsqrt(jnp.sum(embedding**2, axis=-1, keepdims=True))
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


def aesthetic_input(images: Float[Array, "b h w 3"]) -> Float[Array, "b 224 224 3"]:
    """What CLIP ViT-L/14 gets to see of images in [-1, 1]: squeezed to 224 x 384 pixels, cropped, normalised.

    The aspect ratio is not kept and nothing is antialiased, as in the released code.
    """
    return normalise_for_clip(resize_bilinear(images, *RESIZED)[:, :, CROPPED])
