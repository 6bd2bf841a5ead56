"""Rotary embeddings against their closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptax.layers.rope import RopeScaling, frequencies, rotate, rotation


def llama3(inverse, factor, low, high, original):
  """The piecewise rule by wavelength, one frequency at a time."""
  wavelength = 2 * math.pi / inverse
  if wavelength < original / high:
    return inverse
  if wavelength > original / low:
    return inverse / factor
  smooth = (original / wavelength - low) / (high - low)
  return (1 - smooth) * inverse / factor + smooth * inverse


@pytest.mark.parametrize("dim, theta", [(64, 1e5), (128, 5e5), (8, 1e4)])
def test_frequencies(dim, theta):
  plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
  np.testing.assert_allclose(frequencies(dim, theta), plain, rtol=1e-6)
  linear = RopeScaling(kind="linear", factor=4.0)
  np.testing.assert_allclose(
    frequencies(dim, theta, linear), np.divide(plain, 4), rtol=1e-6
  )


@pytest.mark.parametrize(
  "factor, low, high, original",
  [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 3.0, 1024)],
)
def test_llama3_scaling(factor, low, high, original):
  scaling = RopeScaling("llama3", factor, low, high, original)
  plain = frequencies(128, 5e5).astype(np.float64)
  expected = [llama3(x, factor, low, high, original) for x in plain]
  actual = frequencies(128, 5e5, scaling)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert actual[0] == plain[0].astype(np.float32)
  assert actual[-1] == pytest.approx(plain[-1] / factor, rel=1e-6)


def test_a_rotation_is_a_complex_product():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3, 8))
  positions = rng.integers(0, 500, (2, 5))
  inverse = frequencies(8, 1e4)
  angles = positions[..., None, None] * inverse.astype(np.float64)
  product = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  actual = rotate(
    jnp.asarray(x, "f"), rotation(jnp.asarray(positions), inverse)
  )
  expected = np.concatenate([product.real, product.imag], -1)
  np.testing.assert_allclose(actual, expected, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(
  q=st.integers(0, 1000), k=st.integers(0, 1000), shift=st.integers(0, 999)
)
def test_scores_depend_on_distance_alone(q, k, shift):
  rng = np.random.default_rng(0)
  inverse = frequencies(16, 1e4)

  def score(*positions):
    rotated = rotate(vectors, rotation(jnp.asarray(positions), inverse))
    return float(jnp.vdot(rotated[0], rotated[1]))

  vectors = jnp.asarray(rng.standard_normal((2, 1, 16)), jnp.float32)
  assert score(q, k) == pytest.approx(score(q + shift, k + shift), abs=5e-3)


def test_the_type_of_the_input_is_kept():
  cos_sin = rotation(jnp.arange(4), frequencies(8, 1e4))
  x = jnp.ones((4, 1, 8), jnp.bfloat16)
  assert rotate(x, cos_sin).dtype == jnp.bfloat16
  exact = rotate(x.astype(jnp.float32), cos_sin)
  np.testing.assert_array_equal(rotate(x, cos_sin), exact.astype(jnp.bfloat16))


def test_an_unknown_scaling_is_refused():
  message = "unknown RoPE scaling 'lama3': did you mean llama3"
  with pytest.raises(ValueError, match=message):
    RopeScaling(kind="lama3")
