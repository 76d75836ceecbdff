"""CLIP's visual towers (Radford et al. 2021), which turn the input view into the U-Net's single cross-attention token.

Hi3D uses two: OpenCLIP ViT-H/14 (laion2b_s32b_b79k) for the token, OpenAI ViT-L/14 under the aesthetic predictor. Both
give the pooled, projected class token, not normalised to unit length. Text towers are no part of this library.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.resampling import resize_bicubic
from hi3d_jax.models.vit import TransformerBlock, layer_norm, scan_blocks, stacked

# Statistics of CLIP's training pictures, for RGB in [0, 1].
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Size of a visual tower; images are squares of `image_size` pixels cut in patches of `patch_size`."""

    # Side of the images in pixels.
    image_size: int = 224
    # Side of a patch in pixels.
    patch_size: int = 14
    # Numbers per token.
    width: int = 1280
    # Hidden width of the layers between attentions.
    mlp_width: int = 5120
    # Transformer blocks.
    num_layers: int = 32
    # Attention heads of each block.
    num_heads: int = 16
    # Numbers of the embedding: the U-Net's context_dim.
    projection_dim: int = 1024
    # Nonlinearity of the layers between attentions.
    activation: Literal["gelu", "quick_gelu"] = "gelu"

    @classmethod
    def vit_h_14(cls) -> "CLIPVisionConfig":
        """OpenCLIP's ViT-H-14, the image encoder of SVD and Hi3D."""
        return cls()

    @classmethod
    def vit_l_14(cls) -> "CLIPVisionConfig":
        """OpenAI's ViT-L/14, under the aesthetic predictor."""
        return cls(width=1024, mlp_width=4096, num_layers=24, num_heads=16, projection_dim=768, activation="quick_gelu")


class CLIPVision(nnx.Module):
    """A vision transformer: patches and a class token, `num_layers` blocks, the class token projected."""

    def __init__(
        self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        if config.image_size % config.patch_size or config.width % config.num_heads:
            raise ValueError(
                f"image_size {config.image_size} must be a multiple of patch_size {config.patch_size}, and "
                f"width {config.width} one of num_heads {config.num_heads}"
            )
        self.config = config
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        width, patch = config.width, (config.patch_size, config.patch_size)
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        normal = nnx.initializers.normal(width**-0.5)
        self.patch_embedding = nnx.Conv(
            3, width, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs, **kwargs
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,), param_dtype))
        self.position_embedding = nnx.Param(normal(rngs.params(), (num_tokens, width), param_dtype))
        self.pre_norm = layer_norm(width, 1e-5, rngs=rngs, **kwargs)
        block = functools.partial(
            TransformerBlock, width, config.num_heads, config.mlp_width, config.activation, **kwargs
        )
        self.layers = stacked(lambda rngs: block(rngs=rngs), config.num_layers, rngs)
        self.post_norm = layer_norm(width, 1e-5, rngs=rngs, **kwargs)
        self.projection = nnx.Linear(width, config.projection_dim, use_bias=False, rngs=rngs, **kwargs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeddings of images that went through `clip_input` (or `aesthetic_input`). Raises `ValueError` on size."""
        side = self.config.image_size
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"CLIP got images of {images.shape[1:3]}; this tower takes {side} x {side}: use clip_input"
            )
        patches = self.patch_embedding(images)
        patches = patches.reshape(len(images), -1, patches.shape[-1])
        class_token = jnp.broadcast_to(self.class_embedding[...], (len(images), 1, patches.shape[-1]))
        tokens = jnp.concatenate([class_token.astype(patches.dtype), patches], axis=1)
        tokens = tokens + self.position_embedding[...].astype(patches.dtype)[None]
        tokens = scan_blocks(self.layers, self.pre_norm(tokens))
        return self.projection(self.post_norm(tokens[:, 0]))


def clip_input(images: Float[Array, "b h w 3"], size: int = 224) -> Float[Array, "b {size} {size} 3"]:
    """What the ViT-H/14 gets to see of images in [-1, 1]: resized without keeping the aspect ratio, then normalised."""
    return normalise_for_clip(resize_bicubic(images, size, size))


def normalise_for_clip(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Images in [-1, 1] in units of CLIP's training statistics."""
    return ((images + 1) / 2 - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)
