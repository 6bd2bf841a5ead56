"""What adapters may wrap: maps of the last axis with an (in, out) kernel."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx


@runtime_checkable
class LinearMap(Protocol):
  """The part of `nnx.Linear` that a quantised map has too.

  Attributes:
    in_features: size of the last input axis.
    out_features: size of the last output axis.
    bias: (out,) or None.
    dtype: of the matrix product; None takes that of the input.
  """

  in_features: int
  out_features: int
  bias: Any
  dtype: Any

  def __call__(self, x: jax.Array) -> jax.Array: ...


def is_linear(module: Any) -> bool:
  """Whether a module is a plain or quantised linear map."""
  return isinstance(module, nnx.Linear) or hasattr(module, "dequantize")


def kernel_of(base: Any) -> jax.Array:
  """Returns the (in, out) kernel in float32, dequantised where needed."""
  if hasattr(base, "dequantize"):
    return base.dequantize()
  return base.kernel[...].astype(jnp.float32)


def with_kernel(base: Any, kernel: jax.Array) -> nnx.Linear:
  """Returns a plain linear map of `kernel` (in, out) with the base's bias.

  The kernel is stored in the type of the base's, which for a quantised one is
  that of the kernel it was made from.
  """
  if isinstance(base, nnx.Linear):
    linear = nnx.clone(base)
    linear.kernel[...] = kernel.astype(base.kernel.dtype)
    return linear
  linear = nnx.eval_shape(
    lambda: nnx.Linear(
      base.in_features,
      base.out_features,
      use_bias=base.bias is not None,
      dtype=base.dtype,
      param_dtype=base.param_dtype,
      rngs=nnx.Rngs(0),
    )
  )
  linear.kernel = nnx.Param(kernel.astype(base.param_dtype))
  if base.bias is not None:
    linear.bias = nnx.Param(base.bias[...])
  return linear
