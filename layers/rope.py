"""Rotary position embeddings in the half-split convention of Hugging Face."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from adaptax.pallas_kernels.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How frequencies stretch to contexts longer than those of pre-training.

  Attributes:
    kind: `linear` divides every frequency by `factor`; `llama3` divides only
      the slow ones and blends between the two wavelength limits (Llama 3.1
      model card and `transformers`' `rope_type="llama3"`).
    factor: ratio of the new context to the old one.
    low_freq_factor: wavelengths above `original_context / low_freq_factor`
      are divided in full (`llama3` only).
    high_freq_factor: wavelengths below `original_context / high_freq_factor`
      are left alone (`llama3` only).
    original_context: tokens of context in pre-training (`llama3` only).
  """

  kind: str = "llama3"
  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise unknown_name("RoPE scaling", self.kind, ("linear", "llama3"))


def frequencies(
  dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Returns the (dim / 2,) float32 angular frequencies, in radians a token."""
  inverse = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
  if scaling is None:
    return inverse.astype(np.float32)
  slow = inverse / scaling.factor
  if scaling.kind == "linear":
    return slow.astype(np.float32)
  turns = scaling.original_context * inverse / (2 * math.pi)
  span = scaling.high_freq_factor - scaling.low_freq_factor
  keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
  return (keep * inverse + (1 - keep) * slow).astype(np.float32)


def rotation(
  positions: jax.Array, inverse: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines, each (..., T, dim / 2) float32.

  Args:
    positions: int32 (..., T), restarting at zero in every document.
    inverse: (dim / 2,) frequencies.
  """
  angles = positions[..., None].astype(jnp.float32) * inverse
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates x (..., T, heads, dim) by angles (..., T, dim / 2)."""
  cos, sin = (t[..., None, :] for t in cos_sin)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
