"""LoRA, rsLoRA, DoRA, PiSSA and OLoRA against worked numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptax.layers.adapters import (
  AdapterParam,
  LoRA,
  count,
  dora,
  lora,
  lora_init,
  trainable,
)
from adaptax.layers.quantized import QuantizedLinear

# Written as in the literature: W (out, in), A (rank, in), B (out, rank).
W = np.array([[1.0, 2], [3, 4], [5, 6]])
A = np.array([[1.0, -1]])
B = np.array([[1.0], [0], [2]])
X = np.array([1, 2], np.float32)


def linear(weight, bias=None, dtype=jnp.float32) -> nnx.Linear:
  outputs, inputs = weight.shape
  module = nnx.Linear(
    inputs,
    outputs,
    use_bias=bias is not None,
    param_dtype=dtype,
    rngs=nnx.Rngs(0),
  )
  module.kernel[...] = jnp.asarray(weight.T, dtype)
  if bias is not None:
    module.bias[...] = jnp.asarray(bias, dtype)
  return module


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def make(base, **arguments) -> LoRA:
  """A LoRA whose trainable leaves are all away from their first values."""
  adapter = LoRA(base, rngs=nnx.Rngs(0), **arguments)
  state = trainable(adapter)
  noise = lambda x: x + jnp.asarray(0.3 * normal(*x.shape), x.dtype)
  nnx.update(adapter, jax.tree.map(noise, state))
  return adapter


def worked(use_dora=False, bias=None) -> LoRA:
  base = linear(W, bias)
  adapter = LoRA(base, rank=1, alpha=2.0, use_dora=use_dora, rngs=nnx.Rngs(0))
  adapter.a[...], adapter.b[...] = jnp.asarray(A.T), jnp.asarray(B.T)
  return adapter


def gradients_of(adapter, loss):
  """Gradients of loss(adapter) in its trainable leaves."""
  graphdef, some, frozen = nnx.split(adapter, AdapterParam, ...)
  return jax.grad(lambda s: loss(nnx.merge(graphdef, s, frozen)))(some)


def close(actual, desired, atol=1e-5):
  np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def test_worked_lora():
  adapter = worked()
  close(adapter(X), [3, 11, 13])
  close(adapter.merge().kernel[...].T, [[3, 0], [3, 4], [9, 2]])
  gradients = gradients_of(adapter, lambda adapter: adapter(X).sum())
  assert set(gradients) == {"a", "b"}
  close(gradients["b"][...].T, [[-2], [-2], [-2]])
  close(gradients["a"][...].T, [[6, 12]])


@pytest.mark.parametrize("bias", [None, np.array([1.0, -1, 0.5])])
def test_worked_dora(bias):
  adapter = worked(use_dora=True, bias=bias)
  kernel, a, b = adapter.base.kernel[...], adapter.a[...], adapter.b[...]
  close(adapter.magnitude[...], [2.236068, 5, 7.810250])
  close(dora.norm(kernel, a, b, 2.0), [3, 5, 9.219544])
  shift = 0 if bias is None else bias
  close(adapter(X), shift + np.array([2.236068, 11, 11.012827]))
  merged = adapter.merge()
  close(merged.kernel[...].T, [[2.236068, 0], [3, 4], [7.624274, 1.694283]])
  close(merged(X), adapter(X))


@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 1000), rank=st.integers(1, 3), scale=st.floats(0.1, 8)
)
def test_the_factored_norm_is_that_of_the_sum(seed, rank, scale):
  kernel, a, b = normal(7, 5, seed=seed), normal(7, rank), normal(rank, 5)
  expected = np.linalg.norm(kernel + scale * a @ b, axis=0)
  actual = dora.norm(*(jnp.asarray(x, "f") for x in (kernel, a, b)), scale)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_dora_gradients_are_those_with_a_constant_norm():
  adapter = make(linear(W), rank=2, alpha=2.0, use_dora=True)
  x, g = normal(4, 2), normal(4, 3, seed=1)
  gradients = gradients_of(
    adapter, lambda adapter: jnp.vdot(adapter(jnp.asarray(x, "f")), g)
  )
  a, b, m = (
    np.asarray(v[...], np.float64)
    for v in (adapter.a, adapter.b, adapter.magnitude)
  )
  v = W.T + a @ b
  n = np.linalg.norm(v, axis=0)
  close(gradients["magnitude"][...], (x @ v / n * g).sum(0))
  close(gradients["b"][...], (x @ a).T @ (g * m / n))
  close(gradients["a"][...], x.T @ (g * m / n) @ b.T)


def test_a_zero_column_stays_finite_under_dora():
  base = linear(np.array([[0.0, 0], [1, 2]]))
  adapter = LoRA(base, rank=1, use_dora=True, rngs=nnx.Rngs(0))
  close(adapter(X), [0, 5])
  gradients = gradients_of(adapter, lambda adapter: adapter(X).sum())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_dropout_acts_on_the_adapters_input_alone():
  adapter = make(linear(W, np.ones(3)), rank=1, alpha=2.0, dropout=0.5)
  x = np.ones((50, 2), np.float32)
  dropped = _dropped(adapter, x)
  assert 0 < (dropped == 0).mean() < 1
  change = 2 * dropped @ np.asarray(adapter.a) @ np.asarray(adapter.b)
  close(adapter(x), x @ W.T + 1 + change)
  adapter.eval()
  close(adapter(x), adapter.merge()(x))


def test_dora_rescales_the_base_of_the_dropped_input():
  bias = np.array([1.0, 2, 3])
  adapter = make(linear(W, bias), rank=1, dropout=0.5, use_dora=True)
  x = np.ones((50, 2), np.float32)
  a, b = (np.asarray(v[...], np.float64) for v in (adapter.a, adapter.b))
  v = W.T + adapter.scale * a @ b
  gain = np.asarray(adapter.magnitude) / np.linalg.norm(v, axis=0)
  expected = x @ W.T + bias + _dropped(adapter, x) @ (gain * v - W.T)
  close(adapter(x), expected, 1e-4)


def _dropped(adapter, x):
  """x as the next call of an adapter with a dropout rate of 1/2 sees it."""
  stream = adapter.dropout.rngs
  key = jax.random.fold_in(stream.key[...], stream.count[...])
  return np.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


def test_worked_pissa():
  weight = np.array([[3.0, 0], [0, 1], [0, 0]])
  base = linear(weight)
  adapter = LoRA(base, rank=1, alpha=2.0, init="pissa", rngs=nnx.Rngs(0))
  sign = np.sign(adapter.a[0, 0])
  close(sign * adapter.a[...].T, [[1.224745, 0]])
  close(sign * adapter.b[...].T, [[1.224745], [0], [0]])
  close(adapter.base.kernel[...].T, [[0, 0], [0, 1], [0, 0]])
  close(adapter.merge().kernel[...].T, weight)
  close(base.kernel[...].T, weight, atol=0)


def test_worked_olora():
  weight = np.array([[3.0, 1], [4, 2]])
  adapter = LoRA(
    linear(weight), rank=1, alpha=2.0, init="olora", rngs=nnx.Rngs(0)
  )
  close((adapter.a[...] @ adapter.b[...]).T, [[3, 1.32], [4, 1.76]])
  close(adapter.base.kernel[...].T, [[-3, -1.64], [-4, -1.52]])
  close(adapter.merge().kernel[...].T, weight)


@pytest.mark.parametrize("init", lora_init.FROM_KERNEL)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_changed_base_converts_to_plain_lora_on_the_original(
  init, use_rslora, use_dora
):
  base = linear(normal(6, 8), normal(6))
  variant = {"use_rslora": use_rslora, "use_dora": use_dora}
  adapter = make(base, rank=2, alpha=3.0, init=init, **variant)
  a, b, alpha, rank = adapter.to_plain()
  plain = LoRA(base, rank=rank, alpha=alpha, rngs=nnx.Rngs(1), **variant)
  assert rank == 4 and plain.scale == pytest.approx(adapter.scale)
  plain.a[...], plain.b[...] = a, b
  if use_dora:
    plain.magnitude[...] = adapter.magnitude[...]
  x = normal(5, 8).astype("f")
  close(plain(x), adapter(x), 2e-5)


def test_plain_lora_converts_to_itself():
  adapter = make(linear(W), rank=1, alpha=3.0)
  a, b, alpha, rank = adapter.to_plain()
  assert (alpha, rank) == (3.0, 1)
  np.testing.assert_array_equal(a, adapter.a[...])
  np.testing.assert_array_equal(b, adapter.b[...])


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_first_output_is_the_bases_bit_for_bit(init):
  base = linear(normal(6, 8), normal(6))
  x = normal(5, 8).astype("f")
  adapter = LoRA(base, rank=2, init=init, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(adapter(x), base(x))
  adapter = LoRA(base, rank=2, init=init, use_dora=True, rngs=nnx.Rngs(0))
  close(adapter(x), base(x))


def test_scale():
  assert lora_of(rank=4, alpha=16.0).scale == 4
  assert lora_of(rank=4, alpha=16.0, use_rslora=True).scale == 8


def lora_of(inputs=64, outputs=48, **arguments):
  return LoRA(
    linear(np.zeros((outputs, inputs))), rngs=nnx.Rngs(0), **arguments
  )


def test_first_values():
  rank, key = 16, jax.random.key(0)

  def first(init):
    return (np.asarray(x) for x in lora_init.RANDOM[init](key, 400, 48, rank))

  a, b = first("kaiming")
  assert a.shape == (400, rank) and b.shape == (rank, 48) and not b.any()
  assert np.abs(a).max() == pytest.approx(1 / 20, rel=1e-2)
  assert np.std(a) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
  a, b = first("gaussian")
  assert np.std(a) == pytest.approx(1 / rank, rel=0.03) and not b.any()
  a, b = first("random")
  assert np.abs(b).max() == pytest.approx(1 / 4, rel=1e-2) and a.any()
  a, b = first("orthogonal")
  assert np.std(a) > 0.05 and np.std(b) > 0.05
  close(a @ b, 0, 1e-6)


def test_counts_and_rank():
  adapter = make(linear(normal(6, 8)), rank=2, use_dora=True)
  assert count(adapter).trainable == 2 * (8 + 6) + 6
  assert count(adapter).total == 2 * (8 + 6) + 6 + 6 * 8
  change = lora.delta(adapter.a[...], adapter.b[...], adapter.scale)
  assert np.linalg.matrix_rank(change) == 2


def test_a_merge_rounds_once():
  weight = normal(6, 8)
  adapter = make(linear(weight, dtype=jnp.bfloat16), rank=2)
  kernel = np.asarray(adapter.base.kernel[...], np.float64)
  a, b = (np.asarray(v[...], np.float64) for v in (adapter.a, adapter.b))
  merged = adapter.merge().kernel[...]
  assert adapter.a.dtype == jnp.float32 and merged.dtype == jnp.bfloat16
  expected = (kernel + adapter.scale * a @ b).astype(jnp.bfloat16)
  np.testing.assert_array_equal(merged, expected)


def test_dora_compiles_without_temporaries_of_the_kernels_size():
  adapter = make(linear(normal(512, 256)), rank=2, use_dora=True)
  graphdef, state = nnx.split(adapter)
  call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  memory = call.lower(state, jnp.ones((2, 256))).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 512 * 256


@pytest.mark.parametrize(
  "arguments, words",
  [
    ({"rank": 0}, r"rank 0 does not fit a matrix of 64 x 48: use 1 to 48"),
    ({"rank": 49}, r"rank 49 does not fit a matrix of 64 x 48: use 1 to 48"),
    ({"alpha": 0.0}, r"alpha must be positive, got 0.0"),
    ({"alpha": math.nan}, r"alpha must be positive, got nan"),
    ({"dropout": 1.0}, r"dropout must be at least 0 and below 1: 1.0"),
    ({"dropout": -0.1}, r"dropout must be at least 0 and below 1: -0.1"),
    ({"init": "pisa"}, r"unknown init 'pisa': did you mean pissa\?"),
    ({"init": "orthogonal", "rank": 3}, r"needs an even rank, got 3"),
  ],
)
def test_bad_arguments(arguments, words):
  with pytest.raises(ValueError, match=words):
    lora_of(**arguments)


@pytest.mark.parametrize("init", lora_init.FROM_KERNEL)
def test_a_quantised_base_cannot_change(init):
  base = QuantizedLinear(linear(normal(48, 64)))
  with pytest.raises(ValueError, match=f"init {init} changes the base kernel"):
    LoRA(base, init=init, rngs=nnx.Rngs(0))


class Dense(linen.Module):
  """A linen layer that uses the pure functions."""

  @linen.compact
  def __call__(self, x):
    kernel = self.param("kernel", linen.initializers.normal(), (8, 6))
    a = self.param("a", linen.initializers.normal(), (8, 2))
    b = self.param("b", linen.initializers.normal(), (2, 6))
    return x @ kernel + lora.forward(x, a, b, 2.0)


def test_pure_functions_serve_linen():
  x = normal(5, 8).astype("f")
  module = nnx.bridge.ToNNX(Dense(), rngs=nnx.Rngs(0)).lazy_init(x)
  ours = LoRA(linear(normal(6, 8)), rank=2, alpha=4.0, rngs=nnx.Rngs(0))
  ours.base.kernel[...] = module.kernel[...]
  ours.a[...], ours.b[...] = module.a[...], module.b[...]
  close(ours(x), module(x))
