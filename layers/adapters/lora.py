"""Low-rank adaptation and its close variants."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptax.layers.adapters import dora, lora_init
from adaptax.layers.adapters.base import (
  Adapter,
  AdapterBuffer,
  AdapterParam,
  check_rank,
)
from adaptax.layers.linear import kernel_of, with_kernel
from adaptax.pallas_kernels.errors import unknown_name


def delta(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Returns scale * a b, float32 (in, out), of a (in, rank), b (rank, out)."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return scale * jnp.matmul(a, b, precision="highest")


def forward(
  x: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
  """Returns scale * (x a) b for x (..., in), in the type of x."""
  return (x @ a.astype(x.dtype) * scale) @ b.astype(x.dtype)


class LoRA(Adapter):
  """Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685).

  y = base(x) + scale * (dropout(x) a) b, with a (in, rank) and b (rank, out).
  The conventions are those of huggingface/peft.

  Sharding: where the kernel is cut along `out`, cut b along `out` and keep a
  whole; where it is cut along `in`, cut a along `in`, and x a and DoRA's norm
  are sums over devices.

  Attributes:
    rank: inner size of the change.
    alpha: numerator of the scale.
    scale: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
    a: (in, rank).
    b: (rank, out).
    magnitude: (out,) with `use_dora`, else None.
    initial_a: (in, rank), what `init` took out of the base kernel, or None.
    initial_b: (rank, out), likewise.
  """

  name = "lora"

  def __init__(
    self,
    base: Any,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    use_rslora: bool = False,
    dropout: float = 0.0,
    init: str = "kaiming",
    use_dora: bool = False,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Wraps a linear map.

    Args:
      base: a plain or quantised linear map.
      rank: inner size of the change.
      alpha: numerator of the scale.
      use_rslora: divides alpha by sqrt(rank) (Kalajdzievski, 2023, arXiv
        2312.03732).
      dropout: rate on the adapter's input, never on the base's.
      init: `kaiming`, `gaussian`, `orthogonal` or `random`; or `pissa` or
        `olora`, which move a part of the base kernel into the factors.
      use_dora: trains the norms of the kernel's columns too (see `dora`).
      param_dtype: of the trainable leaves.
      rngs: streams `params` and, for dropout, `dropout`.

    Raises:
      ValueError: if an argument is out of range, or `init` has to change a
        quantised base.
    """
    check_rank(rank, base)
    if not alpha > 0:
      raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
      raise ValueError(f"dropout must be at least 0 and below 1: {dropout}")
    self.base = base
    self.rank = rank
    self.alpha = alpha
    self.use_rslora = use_rslora
    self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
    a, b = (x.astype(param_dtype) for x in self._factors(init, rngs))
    self.a, self.b = AdapterParam(a), AdapterParam(b)
    changes = init in lora_init.FROM_KERNEL
    self.initial_a = AdapterBuffer(a) if changes else None
    self.initial_b = AdapterBuffer(b) if changes else None
    if changes:
      residual = kernel_of(base) - delta(a, b, self.scale)
      self.base = with_kernel(base, residual)
    self.magnitude = (
      AdapterParam(self._norm().astype(param_dtype)) if use_dora else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    y = self.base(x)
    dropped = self.dropout(x)
    update = forward(
      dropped.astype(y.dtype), self.a[...], self.b[...], self.scale
    )
    gain = self._gain()
    if gain is None:
      return y + update
    # DoRA rescales the base's part too, and that of the same input.
    linear = y if dropped is x else self.base(dropped)
    if self.base.bias is not None:
      linear -= self.base.bias[...].astype(y.dtype)
    return dora.forward(y, linear, update, gain)

  def merge(self) -> nnx.Linear:
    """Returns a plain linear map with the change folded in."""
    change = delta(self.a[...], self.b[...], self.scale)
    kernel, gain = kernel_of(self.base) + change, self._gain()
    return with_kernel(self.base, kernel if gain is None else kernel * gain)

  def to_plain(self) -> tuple[jax.Array, jax.Array, float, int]:
    """Returns (a, b, alpha, rank) of the same change to the original base.

    After `pissa` and `olora` the rank is doubled and alpha such that the scale
    stays; leaves may be stacked. Exact up to the rounding of the base kernel.
    """
    a, b = self.a[...], self.b[...]
    if self.initial_a is None or self.initial_b is None:
      return a, b, self.alpha, self.rank
    a = jnp.concatenate([a, self.initial_a[...]], -1)
    b = jnp.concatenate([b, -self.initial_b[...]], -2)
    alpha = self.alpha * (math.sqrt(2) if self.use_rslora else 2)
    return a, b, alpha, 2 * self.rank

  def _factors(self, init: str, rngs: nnx.Rngs) -> lora_init.Factors:
    base = self.base
    if init in lora_init.RANDOM:
      make = lora_init.RANDOM[init]
      return make(rngs.params(), base.in_features, base.out_features, self.rank)
    if init not in lora_init.FROM_KERNEL:
      known = (*lora_init.RANDOM, *lora_init.FROM_KERNEL)
      raise unknown_name("init", init, known)
    if not isinstance(base, nnx.Linear):
      raise ValueError(
        f"init {init} changes the base kernel, which a quantised base cannot"
        f" hold: use one of {', '.join(lora_init.RANDOM)}"
      )
    return lora_init.FROM_KERNEL[init](kernel_of(base), self.rank, self.scale)

  def _norm(self) -> jax.Array:
    kernel = kernel_of(self.base)
    return dora.norm(kernel, self.a[...], self.b[...], self.scale)

  def _gain(self) -> jax.Array | None:
    if self.magnitude is None:
      return None
    return self.magnitude[...].astype(jnp.float32) / self._norm()
