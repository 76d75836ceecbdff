"""Matrix products and convolutions in the way that suits the platform they are lowered for.

Everywhere but on CPU these are XLA's own. XLA's CPU backend widens a bfloat16 product to float32 first and works at
float32's rate; only a product whose result is declared float32 reaches the processor's bfloat16 units, nearly twice as
fast. Its convolutions never do, so in bfloat16 they are written as such products. And it computes the gradient of
kernels that are one wide at a tenth of the convolution's own rate, of narrow ones over many pictures at a quarter:
these are written as products too. The choice is made when the program is lowered, so that one for TPU can be compiled
on a machine without.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

Padding = tuple[tuple[int, int], tuple[int, int]]

# Patches gathered for a convolution on CPU: larger ones would leave the cache, and memory with it.
MAX_PATCH_BYTES = 2**26


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """`lax.dot_general` of activations and a kernel of one dtype, which is the result's."""
    product = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers, precision=precision, **kwargs)
    if x.dtype != jnp.bfloat16:
        return product(x, kernel)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: product(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype),
        default=product,
    )


def matmul(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """x @ kernel."""
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c d"], stride: int, padding: Padding
) -> Float[Array, "n h2 w2 d"]:
    """Cross-correlation over (h, w).

    Few positions go as one matrix product of gathered patches: XLA's CPU convolution of 16 views of 2x2 with 1280
    channels takes 865 ms, this 13 ms. Real sizes (8x8 and more) are not concerned.
    """
    height, width = _output_size(x, kernel, stride, padding)
    if height * width <= 16 or len(x) * height * width <= 512:
        return _convolve_patches(x, kernel, stride, padding)
    convolution = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    kh, kw, c, d = kernel.shape
    if x.dtype != jnp.bfloat16:
        narrow = len(x) >= 32 and height * width >= 256 and 16 <= min(c, d) <= 64 and max(c, d) <= 128
        # Where there is nothing to gain, derivatives stay XLA's: forward ones, too.
        on_cpu = x.dtype == kernel.dtype == jnp.float32 and jax.default_backend() == "cpu"
        if stride == 1 and (kw == 1 or narrow) and on_cpu:
            return _convolve_narrow(x, kernel, padding)
        return convolution(x, kernel)
    patch_bytes = height * width * kh * kw * c * x.dtype.itemsize
    if height * width < 256:
        by_products = functools.partial(_convolve_taps, stride=stride, padding=padding)
    elif patch_bytes <= MAX_PATCH_BYTES:
        by_products = functools.partial(_convolve_views, stride=stride, padding=padding)
    else:
        return convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=by_products, default=convolution)


def _output_size(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[int, int]:
    sizes = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    height, width = ((n + sum(p) - k) // stride + 1 for n, k, p in sizes)
    return height, width


def _taps(x: Array, kernel: Array, stride: int, padding: Padding) -> list[Array]:
    """What each of the kernel's positions sees of x: kh * kw arrays [n h2 w2 c]."""
    height, width = _output_size(x, kernel, stride, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, right = (height - 1) * stride + 1, (width - 1) * stride + 1
    kh, kw = kernel.shape[:2]
    return [x[:, i : i + down : stride, j : j + right : stride] for i in range(kh) for j in range(kw)]


def _convolve_patches(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """One product of all patches with the whole kernel."""
    patches = jnp.concatenate(_taps(x, kernel, stride, padding), axis=-1)
    return matmul(patches, kernel.reshape(-1, kernel.shape[-1]))


def _convolve_views(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """The same for one view after the other, whose patches stay in the cache."""
    return lax.map(lambda view: _convolve_patches(view[None], kernel, stride, padding)[0], x)


def _convolve_taps(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """One product for each position in the kernel, summed in float32: twice as fast for few pixels a view."""
    taps = _taps(x, kernel, stride, padding)
    kernels = kernel.reshape(-1, *kernel.shape[2:])
    dimensions = (((3,), (0,)), ((), ()))
    products = (
        lax.dot_general(tap, k, dimensions, preferred_element_type=jnp.float32)
        for tap, k in zip(taps, kernels, strict=True)
    )
    return functools.reduce(jax.lax.add, products).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_narrow(x: Array, kernel: Array, padding: Padding) -> Array:
    """A convolution of stride 1 whose kernel has few channels or one column; its gradient is fast on CPU.

    It has no forward derivatives (`jax.jvp`): a rule for them that keeps the gradient fast does not pass `jax.vmap`.
    """
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _narrow_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_narrow(x, kernel, padding), (x, kernel)


def _narrow_backward(padding: Padding, kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = kept
    plain = functools.partial(_convolve_narrow.fun, padding=padding)
    (to_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(slope)
    to_kernel = lax.platform_dependent(
        x,
        slope,
        cpu=functools.partial(_kernel_gradient, size=kernel.shape[:2], padding=padding),
        default=lambda x, slope: jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(slope)[0],
    )
    return to_x, to_kernel


_convolve_narrow.defvjp(_narrow_forward, _narrow_backward)


def _kernel_gradient(
    x: Float[Array, "n h w c"], slope: Float[Array, "n h2 w2 d"], size: tuple[int, int], padding: Padding
) -> Float[Array, "kh kw c d"]:
    """Products of the slopes and what the kernel's positions see, one picture after the other: each stays in the cache.

    What the positions in one row of the kernel see lies side by side, and the next row sees the same a line later.
    """
    kh, kw = size
    _, height, width, d = slope.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # XLA would undo the transposition, and take three times as long for the products.
    slopes = lax.optimization_barrier(slope.reshape(len(x), -1, d).swapaxes(1, 2))

    def add(total: Array, picture: tuple[Array, Array]) -> tuple[Array, None]:
        seen, slopes = picture
        seen = jnp.concatenate([seen[:, j : j + width] for j in range(kw)], axis=-1)
        seen = seen.reshape(-1, seen.shape[-1])
        rows = [slopes @ seen[i * width : (i + height) * width] for i in range(kh)]
        return total + jnp.stack(rows), None

    total, _ = lax.scan(add, jnp.zeros((kh, d, kw * x.shape[-1]), x.dtype), (x, slopes))
    return total.reshape(kh, d, kw, -1).transpose(0, 2, 3, 1)
