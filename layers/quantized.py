"""Frozen linear maps stored in 8 or 4 bits: the base of QLoRA.

Dettmers et al., 2023, arXiv 2305.14314. Blocks run along the contraction axis
of the (in, out) kernel, so that a block never crosses outputs or layers. The
block scales stay in float32: double quantisation is left out, which costs
0.37 bits a weight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptax.layers.adapters.base import replace_linear
from adaptax.pallas_kernels.errors import unknown_name

KINDS = ("int8", "nf4")

# The 16 quantiles of a normal distribution, scaled to [-1, 1] with exact zero.
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
NF4_BOUNDARIES = (NF4[1:] + NF4[:-1]) / 2


class QuantizedParam(nnx.Variable):
  """Codes or scales of a quantised map; never trained."""


@functools.partial(jax.jit, static_argnames=("kind", "block_size"))
def encode(
  kernel: jax.Array, kind: str, block_size: int
) -> tuple[jax.Array, jax.Array]:
  """Quantises a kernel (..., in, out) in blocks along `in`.

  Returns:
    Codes: int8 (..., n * block_size, out), or for nf4 uint8 of half as many
    rows, whose high nibble is the earlier row. Scales: float32 (..., n, out),
    the largest absolute value of each block. n is in / block_size rounded up.
  """
  *lead, inputs, outputs = kernel.shape
  count = -(-inputs // block_size)
  padding = [(0, 0)] * len(lead) + [(0, count * block_size - inputs), (0, 0)]
  blocks = jnp.pad(kernel.astype(jnp.float32), padding)
  blocks = blocks.reshape(*lead, count, block_size, outputs)
  scales = jnp.abs(blocks).max(-2)
  units = blocks / jnp.where(scales > 0, scales, 1)[..., None, :]
  units = units.reshape(*lead, count * block_size, outputs)
  if kind == "int8":
    return jnp.round(127 * units).astype(jnp.int8), scales
  codes = jnp.searchsorted(NF4_BOUNDARIES, units, method="compare_all")
  codes = codes.astype(jnp.uint8)
  return codes[..., 0::2, :] << 4 | codes[..., 1::2, :], scales


def decode(
  codes: jax.Array, scales: jax.Array, kind: str, inputs: int
) -> jax.Array:
  """Returns the float32 kernel (..., in, out) of what `encode` gave."""
  if kind == "int8":
    units = codes.astype(jnp.float32) / 127
  else:
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-2)
    units = jnp.take(jnp.asarray(NF4), nibbles, mode="clip")
  *lead, count, outputs = scales.shape
  blocks = units.reshape(*lead, count, -1, outputs) * scales[..., None, :]
  return blocks.reshape(*lead, -1, outputs)[..., :inputs, :]


class QuantizedLinear(nnx.Module):
  """A frozen linear map that holds its kernel in few bits.

  Attributes:
    in_features: size of the last input axis.
    out_features: size of the last output axis.
    bias: (out,) or None, not quantised.
    dtype: of the matrix product; None takes that of input and kernel.
    param_dtype: of the kernel that was quantised.
    kind: one of `KINDS`.
  """

  def __init__(
    self, base: nnx.Linear, *, kind: str = "nf4", block_size: int = 64
  ):
    """Quantises a plain map; one with stacked leaves stays stacked."""
    if kind not in KINDS:
      raise unknown_name("quantisation", kind, KINDS)
    if block_size < 2 or block_size % 2:
      raise ValueError(f"block_size must be even and positive: {block_size}")
    self.in_features = base.in_features
    self.out_features = base.out_features
    self.dtype = base.dtype
    self.param_dtype = base.kernel.dtype
    self.kind = kind
    # A block longer than the kernel would only store padding.
    block_size = min(block_size, base.in_features + base.in_features % 2)
    codes, scales = encode(base.kernel[...], kind, block_size)
    self.codes = QuantizedParam(codes)
    self.scales = QuantizedParam(scales)
    self.bias = base.bias

  def dequantize(self) -> jax.Array:
    """Returns the kernel (in, out) in float32."""
    return decode(
      self.codes[...], self.scales[...], self.kind, self.in_features
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    dtype = self.dtype or jnp.result_type(x, self.param_dtype)

    # Without this, backward through a scan would keep every layer's kernel.
    @jax.checkpoint
    def product(x, codes, scales):
      kernel = decode(codes, scales, self.kind, self.in_features)
      return x @ kernel.astype(dtype)

    y = product(x.astype(dtype), self.codes[...], self.scales[...])
    return y if self.bias is None else y + self.bias[...].astype(dtype)


def quantize(
  model: Any, rule: str, kind: str = "nf4", *, block_size: int = 64
) -> Any:
  """Returns the model with linear maps, chosen by path, quantised.

  Args:
    model: any NNX module. It is left as it is; the result shares its other
      arrays.
    rule: a regular expression for paths, as in `adapt`.
    kind: `int8` (symmetric) or `nf4` (4-bit NormalFloat).
    block_size: inputs that share one scale.

  Raises:
    ValueError: if the rule matches no linear map, or the kind is unknown.
  """

  def make(rule, base, size):
    return QuantizedLinear(base, kind=kind, block_size=block_size)

  return replace_linear(model, [rule], make)
