"""First values of low-rank factors a (in, rank) and b (rank, out).

The names and formulas are those of huggingface/peft.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Factors = tuple[jax.Array, jax.Array]

_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def kaiming(key: jax.Array, inputs: int, outputs: int, rank: int) -> Factors:
  """a uniform within 1 / sqrt(in), b zero: the default."""
  return _uniform(key, (inputs, rank)), jnp.zeros((rank, outputs))


def gaussian(key: jax.Array, inputs: int, outputs: int, rank: int) -> Factors:
  """a normal with standard deviation 1 / rank, b zero."""
  a = jax.random.normal(key, (inputs, rank)) / rank
  return a, jnp.zeros((rank, outputs))


def random(key: jax.Array, inputs: int, outputs: int, rank: int) -> Factors:
  """Both factors uniform, so that the change is not zero; for debugging."""
  keys = jax.random.split(key)
  return _uniform(keys[0], (inputs, rank)), _uniform(keys[1], (rank, outputs))


def orthogonal(key: jax.Array, inputs: int, outputs: int, rank: int) -> Factors:
  """No factor is zero, yet a b is: their rows span orthogonal complements."""
  if rank % 2:
    raise ValueError(f"init orthogonal needs an even rank, got {rank}")
  keys = jax.random.split(key, 3)
  q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
  a = jax.random.normal(keys[1], (inputs, rank // 2)) @ q[0::2]
  b = jax.random.normal(keys[2], (outputs, rank // 2)) @ q[1::2]
  return a / 10, b.T / 10


def pissa(kernel: jax.Array, rank: int, scale: float) -> Factors:
  """The leading singular triplets (Meng et al., 2024, arXiv 2404.02948)."""
  u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
  root = jnp.sqrt(s[:rank] / scale)
  return u[:, :rank] * root, root[:, None] * v[:rank]


def olora(kernel: jax.Array, rank: int, scale: float) -> Factors:
  """The leading part of a QR (Büyükakyüz, 2024, arXiv 2406.01775).

  As published, the factors are not divided by the scale.
  """
  del scale
  q, r = jnp.linalg.qr(kernel.T)
  return r[:rank].T, q[:, :rank].T


RANDOM: dict[str, Callable[[jax.Array, int, int, int], Factors]] = {
  "kaiming": kaiming,
  "gaussian": gaussian,
  "orthogonal": orthogonal,
  "random": random,
}
# These take scale * a @ b out of the base kernel.
FROM_KERNEL: dict[str, Callable[[jax.Array, int, float], Factors]] = {
  "pissa": pissa,
  "olora": olora,
}
