"""The decoder against a float64 NumPy one, and its contracts."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.layers import Decoder, DecoderConfig, RopeScaling

VARIANTS = {
  "llama": {},
  "qwen2": {"qkv_bias": True, "tie_embeddings": True},
  "gemma": {
    "activation": "gelu_tanh",
    "attention_softcap": 2.0,
    "embed_scale": math.sqrt(32),
    "head_dim": 16,
    "logit_softcap": 3.0,
    "mlp_bias": True,
    "out_bias": True,
    "rope_scaling": RopeScaling("linear", factor=2.0),
    "sliding_window": 3,
    "tie_embeddings": True,
  },
}


def norm(x, scale, config):
  square = np.mean(x**2, -1, keepdims=True)
  return x / np.sqrt(square + config.norm_eps) * scale


def linear(x, leaves):
  return x @ leaves["kernel"] + leaves.get("bias", 0)


def rotate(x, positions, config):
  half = config.head_dim // 2
  inverse = config.rope_theta ** (-np.arange(half) / half)
  if config.rope_scaling:
    inverse /= config.rope_scaling.factor
  turn = np.exp(1j * positions[..., None, None] * inverse)
  product = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([product.real, product.imag], -1)


def cap(x, limit):
  return x if limit is None else limit * np.tanh(x / limit)


def attention(q, k, v, start, config):
  """Loops over queries; each sees its document up to itself."""
  out = np.empty_like(q)
  group = config.num_heads // config.num_kv_heads
  for row, i, head in np.ndindex(q.shape[:3]):
    first = start[row, i]
    if config.sliding_window is not None:
      first = max(first, i + 1 - config.sliding_window)
    keys, values = (t[row, first : i + 1, head // group] for t in (k, v))
    scores = cap(
      keys @ q[row, i, head] / math.sqrt(config.head_dim),
      config.attention_softcap,
    )
    weights = np.exp(scores - scores.max())
    out[row, i, head] = weights @ values / weights.sum()
  return out


def activation(x, config):
  if config.activation == "silu":
    return x / (1 + np.exp(-x))
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return x * (1 + np.tanh(inner)) / 2


def decode(weights, config, batch):
  """Logits of a packed batch in float64."""
  heads = lambda x: x.reshape(*x.shape[:2], -1, config.head_dim)
  x = weights["embed"]["embedding"][batch["tokens"]] * config.embed_scale
  for layer in range(config.num_layers):
    block = jax.tree.map(lambda leaf: leaf[layer], weights["layers"])  # noqa: B023
    h = norm(x, block["attention_norm"]["scale"], config)
    q, k, v = (heads(linear(h, block["attention"][name])) for name in "qkv")
    q, k = (rotate(t, batch["positions"], config) for t in (q, k))
    out = attention(q, k, v, batch["start"], config)
    x = x + linear(out.reshape(*x.shape[:2], -1), block["attention"]["o"])
    h = norm(x, block["mlp_norm"]["scale"], config)
    gate, up = (linear(h, block["mlp"][name]) for name in ("gate", "up"))
    x = x + linear(activation(gate, config) * up, block["mlp"]["down"])
  x = norm(x, weights["norm"]["scale"], config)
  if config.tie_embeddings:
    return cap(x @ weights["embed"]["embedding"].T, config.logit_softcap)
  return cap(linear(x, weights["head"]), config.logit_softcap)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_numpy(tiny, name):
  model = tiny.model(**VARIANTS[name])
  weights = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64),
    nnx.to_pure_dict(nnx.state(model)),
  )
  expected = decode(weights, model.config, tiny.batch)
  np.testing.assert_allclose(tiny.logits(model), expected, atol=1e-4)


def test_the_state_has_the_documented_paths(tiny):
  shapes = {
    "/".join(path): leaf.shape
    for path, leaf in nnx.to_flat_state(nnx.state(tiny.model(qkv_bias=True)))
  }
  assert shapes == {
    "embed/embedding": (64, 32),
    "layers/attention/q/kernel": (2, 32, 32),
    "layers/attention/q/bias": (2, 32),
    "layers/attention/k/kernel": (2, 32, 16),
    "layers/attention/k/bias": (2, 16),
    "layers/attention/v/kernel": (2, 32, 16),
    "layers/attention/v/bias": (2, 16),
    "layers/attention/o/kernel": (2, 32, 32),
    "layers/attention_norm/scale": (2, 32),
    "layers/mlp/gate/kernel": (2, 32, 64),
    "layers/mlp/up/kernel": (2, 32, 64),
    "layers/mlp/down/kernel": (2, 64, 32),
    "layers/mlp_norm/scale": (2, 32),
    "norm/scale": (32,),
    "head/kernel": (32, 64),
  }


def test_packed_documents_do_not_see_each_other(tiny):
  model = tiny.model()
  graphdef, state = nnx.split(model)
  first = tiny.batch["start"] == 0
  tokens = np.where(first, 63 - tiny.batch["tokens"], tiny.batch["tokens"])
  run = jax.jit(lambda s, b: tiny.forward(nnx.merge(graphdef, s), b))
  before = run(state, tiny.batch)
  after = run(state, tiny.batch | {"tokens": tokens})
  np.testing.assert_array_equal(before[~first], after[~first])
  assert (np.asarray(before)[first] != np.asarray(after)[first]).mean() > 0.9


def test_bfloat16_activations_keep_float32_weights(tiny):
  model = tiny.model(dtype="bfloat16")
  assert model.layers.mlp.up.kernel.dtype == jnp.float32
  logits = jax.eval_shape(lambda: tiny.forward(model, tiny.batch))
  assert logits.dtype == jnp.bfloat16
  error = np.abs(tiny.logits(model) - tiny.logits(tiny.model()))
  assert error.max() < 0.2 and error.mean() < 0.02


def test_a_loop_over_blocks_equals_the_scan(tiny):
  loop = tiny.logits(tiny.model(scan_layers=False))
  np.testing.assert_allclose(loop, tiny.logits(tiny.model()), atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_the_program_does_not_grow_with_depth(tiny, equations, backward):
  def size(layers):
    config = dataclasses.replace(tiny.config, num_layers=layers, remat="full")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    loss = lambda s: tiny.forward(nnx.merge(graphdef, s), tiny.batch).sum()
    return len(equations(jax.grad(loss) if backward else loss, state))

  assert size(2) == size(30) > 50


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("keys", "values", "length"),
  meta_fields=(),
)
@dataclasses.dataclass
class Cache:
  """Keys and values (rows, T, heads, dim), the first `length` of them valid."""

  keys: jax.Array
  values: jax.Array
  length: jax.Array

  def append(self, k, v):
    put = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=self.length, axis=1
    )
    return Cache(
      put(self.keys, k), put(self.values, v), self.length + k.shape[1]
    )


def test_decoding_with_a_cache_equals_the_whole_forward(tiny):
  model = tiny.model()
  tokens = jnp.asarray(tiny.batch["tokens"])
  rows, length = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
  empty = jnp.zeros((2, rows, length, 2, 8))
  cache = Cache(empty, empty, jnp.zeros(2, jnp.int32))

  def attend(q, k, v, *, scale, softcap, window, first):
    q = q.reshape(rows, -1, 2, 2, 8)
    scores = scale * jnp.einsum("rqkgd,rtkd->rkgqt", q, k)
    seen = jnp.arange(length) <= first + jnp.arange(q.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    out = jnp.einsum("rkgqt,rtkd->rqkgd", weights, v)
    return out.reshape(rows, -1, 4, 8)

  def part(cache, first, last):
    return model.decode(
      tokens[:, first:last],
      positions[:, first:last],
      functools.partial(attend, first=first),
      cache,
    )

  @jax.jit
  def generate(cache):
    start, cache = part(cache, 0, 7)
    end, _ = part(cache, 7, length)
    return jnp.concatenate([start, end], 1)

  batch = {"tokens": tokens, "positions": positions, "start": 0 * positions}
  whole = jax.jit(lambda: tiny.forward(model, batch))()
  np.testing.assert_allclose(generate(cache), whole, atol=1e-5)


def test_the_hooks_of_a_sharding_scheme_are_applied(tiny):
  plain = tiny.model()
  hooked = tiny.model()
  hooked.gather = lambda state: jax.tree.map(lambda leaf: 2 * leaf, state)
  seen = []
  hooked.constrain = lambda x: seen.append(x.shape) or x
  layers = nnx.state(plain.layers)
  nnx.update(plain.layers, jax.tree.map(lambda leaf: 2 * leaf, layers))
  np.testing.assert_allclose(tiny.logits(hooked), tiny.logits(plain), atol=1e-5)
  assert seen and set(seen) == {(*tiny.batch["tokens"].shape, 32)}


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
    ({"activation": "sillu"}, "unknown activation 'sillu': did you mean silu?"),
    ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
    ({"num_heads": 0, "head_dim": 0}, "num_heads must be at least 1, got 0"),
    ({"num_layers": -2}, "num_layers must be at least 1, got -2"),
    ({"hidden_size": 3, "head_dim": 0}, "head_dim must be at least 1, got 0"),
    (
      {"dtype": "bfloat61"},
      "unknown dtype 'bfloat61': did you mean bfloat16? (allowed: float32,"
      " bfloat16, float16, float64)",
    ),
    ({"param_dtype": "int8"}, "unknown param_dtype 'int8' (allowed: float32,"),
    ({"remat": "ful"}, "unknown remat 'ful': did you mean full?"),
  ],
)
def test_bad_configs(tiny, changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    DecoderConfig(**{**vars(tiny.config), **changes})
