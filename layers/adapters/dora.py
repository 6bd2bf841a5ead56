"""Weight-decomposed low-rank adaptation (Liu et al., 2024, arXiv 2402.09353).

The columns of the (in, out) kernel V = W + scale * a b keep their direction
and get a trained length, `magnitude` (out,). Pure functions for `LoRA`.
"""

import jax
import jax.numpy as jnp


def norm(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
  """Returns the norms over `in` of W + scale * a b, without forming it.

  Args:
    kernel: W, (in, out).
    a: (in, rank).
    b: (rank, out).
    scale: of the change.

  Returns:
    float32 (out,), constant to autodiff as in the paper and above zero.
  """
  kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
  square = (
    jnp.square(kernel).sum(0)
    + 2 * scale * ((a.T @ kernel) * b).sum(0)
    + scale**2 * ((a.T @ a) @ b * b).sum(0)
  )
  return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, 1e-12)))


def forward(
  y: jax.Array, linear: jax.Array, update: jax.Array, gain: jax.Array
) -> jax.Array:
  """Returns y + (gain - 1) * linear + gain * update.

  Args:
    y: output of the base, (..., out).
    linear: x W of the adapter's input, without bias, (..., out).
    update: scale * x a b of the same input, (..., out).
    gain: float32 (out,), magnitude / norm.
  """
  less_one = (gain - 1).astype(y.dtype)
  return y + less_one * linear + gain.astype(y.dtype) * update
