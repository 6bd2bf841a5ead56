"""int8 and NF4 bases against the worked numbers of QLoRA."""

import functools
import re
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.layers import quantized
from adaptax.layers.adapters import LoRA, adapt, merge
from adaptax.layers.quantized import (
  NF4,
  NF4_BOUNDARIES,
  QuantizedLinear,
  QuantizedParam,
  decode,
  encode,
  quantize,
)


def round_trip(kernel, kind, block_size=64):
  kernel = jnp.asarray(kernel, jnp.float32)
  codes, scales = encode(kernel, kind, block_size)
  return np.asarray(decode(codes, scales, kind, kernel.shape[-2]))


def linear(inputs=96, outputs=32, **arguments):
  return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0), **arguments)


def test_worked_block():
  block = np.array([0.3, -0.1, 0.05, -0.6, 0, 0.45, -0.25, 0.12])
  codes, scales = encode(jnp.asarray(block[:, None]), "nf4", 8)
  assert scales[0, 0] == np.float32(0.6)
  nibbles = np.stack([codes >> 4, codes & 15], 1).ravel()
  np.testing.assert_array_equal(nibbles, [12, 5, 8, 0, 7, 14, 3, 9])
  expected = [0.2644259, -0.1108641, 0.0477482, -0.6,
              0, 0.4337741, -0.2369505, 0.0965581]  # fmt: skip
  actual = np.asarray(decode(codes, scales, "nf4", 8))[:, 0]
  np.testing.assert_allclose(actual, expected, atol=1e-7)
  assert np.abs(actual - block).max() == pytest.approx(0.0355741, abs=1e-7)


def test_the_table_is_the_published_construction():
  quantile = NormalDist().inv_cdf
  delta = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
  positive = [quantile(p) for p in np.linspace(delta, 0.5, 9)[:-1]]
  negative = [-quantile(p) for p in np.linspace(delta, 0.5, 8)[:-1]]
  table = np.sort([*positive, *negative, 0.0]) / max(positive)
  np.testing.assert_allclose(NF4, table, atol=2e-7)
  np.testing.assert_allclose(
    NF4_BOUNDARIES[[0, 6, 7, 14]],
    [-0.8480964, -0.0455250, 0.0397902, 0.8614784],
    atol=1e-7,
  )


def test_error_on_normal_weights():
  weights = np.random.default_rng(0).standard_normal((4096, 64)).T
  _, scales = encode(jnp.asarray(weights, "f"), "nf4", 64)
  assert scales.shape == (1, 4096)
  assert np.mean(scales) == pytest.approx(2.6085, abs=1e-4)
  assert np.std(scales) == pytest.approx(0.4201, abs=1e-4)
  error = np.mean((round_trip(weights, "nf4") - weights) ** 2)
  assert error == pytest.approx(0.008464, abs=1e-6)
  step = np.abs(weights).max(0) / 127
  error = np.abs(round_trip(weights, "int8") - weights)
  assert (error <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_zeros_and_representable_blocks_are_exact(kind):
  units = NF4 if kind == "nf4" else np.arange(-127, 128, 17) / np.float32(127)
  kernel = np.zeros((64, 3), np.float32)
  kernel[:, 1] = 3.0 * np.resize(units, 64)
  kernel[:, 2] = 1e-30 * np.resize(units, 64)
  np.testing.assert_allclose(round_trip(kernel, kind, 32), kernel, rtol=1e-6)
  assert not round_trip(kernel, kind, 32)[:, 0].any()


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("inputs, block_size", [(64, 16), (50, 16), (7, 64)])
def test_blocks_run_along_the_inputs_of_each_output(kind, inputs, block_size):
  kernel = np.random.default_rng(0).standard_normal((2, inputs, 5))
  actual = round_trip(kernel, kind, block_size)
  units = NF4 if kind == "nf4" else np.arange(-127, 128) / 127
  for layer, output in np.ndindex(2, 5):
    for first in range(0, inputs, block_size):
      block = kernel[layer, first : first + block_size, output]
      scale = np.abs(block).max()
      nearest = np.abs(block[:, None] / scale - units).argmin(1)
      np.testing.assert_allclose(
        actual[layer, first : first + block_size, output],
        scale * units[nearest],
        atol=1e-6,
      )


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("nf4", 4.5)])
def test_bits_of_storage(kind, bits):
  base = QuantizedLinear(linear(256, 16, use_bias=False), kind=kind)
  leaves = jax.tree.leaves(nnx.state(base))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  assert 8 * size == bits * 256 * 16
  assert not jax.tree.leaves(nnx.state(base, nnx.Param))


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_output_is_that_of_the_dequantised_kernel(kind, dtype):
  plain = linear(dtype=dtype)
  plain.bias[...] = jnp.linspace(-1, 1, 32)
  base = QuantizedLinear(plain, kind=kind)
  kernel = base.dequantize()
  assert kernel.dtype == jnp.float32 and kernel.shape == (96, 32)
  plain.kernel[...] = kernel
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 96)), "f")
  assert base(x).dtype == plain(x).dtype
  np.testing.assert_allclose(base(x), plain(x), atol=1e-5)


def test_backward_keeps_no_kernel_and_makes_no_kernel_gradient(equations):
  """Under a scan; the dequantised kernel is made again for backward."""
  base = QuantizedLinear(linear(96, 96, use_bias=False))
  graphdef, state = nnx.split(base)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)

  def loss(x, state):
    step = lambda x, state: (nnx.merge(graphdef, state)(x), None)
    return jax.lax.scan(step, x, state)[0].sum()

  made = equations(jax.grad(loss), jnp.ones((5, 96)), stacked)
  shapes = [v.aval.shape for e in made for v in e.outvars]
  assert (96, 96) in shapes and (3, 96, 96) not in shapes
  products = [
    e.outvars[0].aval.shape for e in made if e.primitive.name == "dot_general"
  ]
  assert products and (96, 96) not in products


def test_a_quantised_decoder_merges_into_its_dequantised_self(tiny):
  rule = "layers/(attention|mlp)/.*"
  model = quantize(tiny.model(), rule, "nf4")
  assert isinstance(model.layers.attention.q, QuantizedLinear)
  assert isinstance(model.head, nnx.Linear)
  rules = {"attention/(q|v)": functools.partial(LoRA, rank=2)}
  adapted = adapt(model, rules, rngs=nnx.Rngs(0))
  adapted.layers.attention.q.b[...] += 0.1
  plain = merge(adapted)
  assert isinstance(plain.layers.attention.q, nnx.Linear)
  assert isinstance(plain.layers.attention.k, QuantizedLinear)
  logits = tiny.logits(adapted)
  np.testing.assert_allclose(tiny.logits(plain), logits, atol=1e-4)
  np.testing.assert_array_equal(
    tiny.logits(adapt(model, rules, rngs=nnx.Rngs(0))), tiny.logits(model)
  )


def test_quantising_leaves_the_model_and_works_abstractly(tiny):
  model = tiny.model()
  made = nnx.eval_shape(lambda: quantize(model, "mlp/.*", "int8"))
  state = nnx.to_flat_state(nnx.state(made, QuantizedParam))
  shapes = {"/".join(path): (leaf.shape, leaf.dtype) for path, leaf in state}
  assert shapes["layers/mlp/down/codes"] == ((2, 64, 32), jnp.int8)
  assert shapes["layers/mlp/down/scales"] == ((2, 1, 32), jnp.float32)
  assert len(shapes) == 6
  assert isinstance(model.layers.mlp.up, nnx.Linear)


def test_bad_arguments(tiny):
  model = tiny.model()
  for arguments, words in (
    (("mlp/upp",), "rule 'mlp/upp' matches no linear map; close paths: "),
    (("mlp/up", "nf5"), "layers/mlp/up: unknown quantisation 'nf5': did you"),
  ):
    with pytest.raises(ValueError, match=re.escape(words)):
      quantize(model, *arguments)
  with pytest.raises(ValueError, match="block_size must be even"):
    quantize(model, "mlp/up", block_size=7)
