"""Decoding with a cache is what the whole forward pass says, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.experiments import decoding
from adaptax.experiments.decoding import Sampling, generate
from adaptax.layers import Decoder, DecoderConfig, RopeScaling

pytestmark = pytest.mark.slow

SMALL = {
  "vocab_size": 61,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
}
VARIANTS = {
  "llama": {},
  "qwen2": {"qkv_bias": True, "tie_embeddings": True},
  "window": {"sliding_window": 4, "num_kv_heads": 1},
  "rope": {
    "rope_scaling": RopeScaling("llama3", factor=4.0, original_context=16)
  },
  "softcap": {
    "attention_softcap": 2.0,
    "logit_softcap": 5.0,
    "embed_scale": 4.0,
    "scan_layers": False,
  },
}
PROMPTS = ([7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 11, 11])
KEY = jax.random.key(0)
GREEDY = Sampling(12, temperature=0)
CANDIDATES = jax.jit(decoding.candidates, static_argnames="top_k")
SAMPLE = jax.jit(decoding.sample, static_argnames="top_k")


def make(**options):
  """A decoder whose weights are all random and large enough to matter."""
  config = DecoderConfig(**SMALL | options)
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  random = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    mean, deviation = (1, 0.3) if path[-1] == "scale" else (0, 0.4)
    noise = random.normal(mean, deviation, leaf.shape)
    leaf.set_value(jnp.asarray(noise, leaf.dtype))
  return model


@pytest.fixture(scope="module")
def llama():
  return make()


def naive(q, k, v, *, scale, softcap, window):
  """Attention over one document a row, keys repeated for each query head."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("rqhd,rkhd->rhqk", q, k) * scale
  if softcap is not None:
    scores = jnp.tanh(scores / softcap) * softcap
  index = np.arange(q.shape[1])
  distance = index[:, None] - index
  seen = (distance >= 0) & (distance < (window or len(index)))
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  return jnp.einsum("rhqk,rkhd->rqhd", weights, v)


def argmaxes(model, prompts, count, width=32):
  """Continues prompts by the argmax of the whole forward pass at each step."""
  graphdef, state = nnx.split(model)
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  positions = np.broadcast_to(np.arange(width), tokens.shape)
  forward = jax.jit(
    lambda state, tokens: nnx.merge(graphdef, state)(tokens, positions, naive)
  )
  rows, ends = np.arange(len(prompts)), np.array([len(p) for p in prompts])
  for step in range(count):
    logits = np.asarray(forward(state, tokens))
    last = ends + step - 1
    tokens[rows, last + 1] = logits[rows, last].argmax(-1)
  return [row[end : end + count] for row, end in zip(tokens, ends)]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_is_the_argmax_of_the_whole_forward_pass(name):
  model = make(**VARIANTS[name])
  expected = argmaxes(model, PROMPTS, GREEDY.max_tokens)
  assert len(np.unique(expected)) > 8
  found = generate(model, PROMPTS, GREEDY, key=KEY)
  np.testing.assert_array_equal(found.tokens, expected)
  assert found.seconds > 0


def test_prompts_of_any_lengths_do_not_see_each_other():
  model = make(sliding_window=60)
  long = np.random.default_rng(1).integers(0, 61, 70)
  together = generate(model, [long, [3, 4]], GREEDY, key=KEY).tokens
  expected = argmaxes(model, [long, [3, 4]], GREEDY.max_tokens, width=96)
  np.testing.assert_array_equal(together, expected)
  alone = generate(model, [[3, 4]], GREEDY, key=KEY).tokens
  np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_cached_attention_is_that_of_the_formula(dtype, atol, softcap, window):
  random = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(random.normal(size=(2, length, heads, 8)), dtype)
    for length, heads in ((1, 6), (10, 2), (10, 2))
  )
  start, column = np.array([0, 4]), 6
  found = decoding.cached_attention(
    *(q, k, v),
    start=start,
    column=column,
    scale=0.3,
    softcap=softcap,
    window=window,
  )
  assert found.dtype == q.dtype
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  for row in range(2):
    first = max(start[row], column - (window or 99) + 1)
    for head in range(6):
      keys, values = (x[row, first : column + 1, head // 3] for x in (k, v))
      scores = keys @ q[row, 0, head] * 0.3
      if softcap:
        scores = softcap * np.tanh(scores / softcap)
      weights = np.exp(scores) / np.exp(scores).sum()
      np.testing.assert_allclose(
        np.asarray(found[row, 0, head], np.float64), weights @ values, atol=atol
      )


@pytest.fixture
def compiled():
  """A list that grows by one for each program that is compiled."""
  programs = []

  def listen(event, _, **__):
    if event.endswith("backend_compile_duration"):
      programs.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield programs
  jax.monitoring.unregister_event_duration_listener(listen)


def test_two_programs_serve_all_prompts_and_settings(llama, compiled):
  keys = [jax.random.key(seed) for seed in range(3)]
  compiled.clear()
  generate(llama, [[1], [2, 3]], Sampling(9, 0.7, 61, 0.9), key=keys[0])
  assert len(compiled) == 2
  other = Sampling(40, 1.3, 61, 0.5)
  generate(llama, [[9] * 20, [4, 5, 6]], other, key=keys[1], eos_id=7)
  generate(llama, [[8], [4]], other, key=keys[2])
  assert len(compiled) == 2


def test_every_draw_has_its_own_key(llama):
  even = Sampling(40, temperature=1e6, top_k=61)

  def run(seed):
    key = jax.random.key(seed)
    return np.array(generate(llama, [[1, 2], [1, 2]], even, key=key).tokens)

  first = run(0)
  np.testing.assert_array_equal(first, run(0))
  # Of 61 ids drawn evenly, two draws agree once in 61 times.
  others = (run(1), first[::-1], np.roll(first, 1, axis=1))
  for other in others:
    assert (first == other).mean() < 0.1
  assert all(len(np.unique(row)) > 22 for row in first)


def test_decoding_stops_at_the_end_token(monkeypatch):
  calls = []
  attend = decoding.cached_attention

  def counted(q, *args, **options):
    jax.debug.callback(lambda: calls.append(1))
    return attend(q, *args, **options)

  monkeypatch.setattr(decoding, "cached_attention", counted)
  model = make(vocab_size=53)

  def run(prompts, eos_id):
    calls.clear()
    tokens = generate(model, prompts, GREEDY, key=KEY, eos_id=eos_id).tokens
    jax.effects_barrier()
    return tokens, len(calls) / SMALL["num_layers"]

  (one, other), steps = run([[5, 6], [9]], None)
  assert steps == len(one) == len(other) == 12
  place = 5
  assert one[place] not in [*one[:place], *other]
  (cut, whole), steps = run([[5, 6], [9]], one[place])
  np.testing.assert_array_equal(cut, one[:place])
  np.testing.assert_array_equal(whole, other)
  assert steps == 12
  (cut, again), steps = run([[5, 6], [5, 6]], one[place])
  assert len(cut) == len(again) == place
  assert steps == place + 1 < 12


def distribution(logits, temperature, top_k, top_p):
  """What may be drawn and how probably, in float64."""
  order = np.argsort(-logits, kind="stable")[: top_k or None]
  weights = np.exp((logits[order] - logits.max()) / temperature)
  weights /= weights.sum()
  before = np.cumsum(weights) - weights
  before[0] = 0
  kept = np.where((before < top_p) | (top_p == 1), weights, 0)
  result = np.zeros(len(logits))
  result[order] = kept / kept.sum()
  return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 99])
@pytest.mark.parametrize("top_p", [1e-9, 0.4, 0.95, 1.0])
def test_candidates_are_those_of_the_formula(temperature, top_k, top_p):
  logits = np.random.default_rng(0).normal(0, 3, (16, 40)).astype(np.float32)
  scores, ids = CANDIDATES(logits, temperature, top_p, top_k=top_k)
  found = np.zeros(logits.shape)
  np.put_along_axis(found, np.asarray(ids), jax.nn.softmax(scores), 1)
  expected = np.stack(
    [
      distribution(row.astype(np.float64), temperature, top_k, top_p)
      for row in logits
    ]
  )
  np.testing.assert_array_equal(found > 0, expected > 0)
  np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_the_nucleus_keeps_tiny_tails():
  """1 - 1e-7 of a float32 sum from the top would lose the last tokens."""
  logits = np.log([[1 - 4e-9, 1e-9, 1e-9, 1e-9, 1e-9]]).astype(np.float32)
  scores, _ = CANDIDATES(logits, 1.0, 1.0, top_k=0)
  assert np.isfinite(scores).all()


@pytest.mark.parametrize(
  "top_k, top_p, kept", [(0, 1.0, 8), (0, 0.74, 2), (0, 0.76, 3), (5, 1.0, 5)]
)
def test_draws_have_the_probabilities_of_the_formula(top_k, top_p, kept):
  """Chi-square over 20000 draws; 24.3 is passed once in 1000 at 7 degrees."""
  logits = np.log(0.5) * np.array([3, 1, 2, 4, 5, 7, 6, 7], np.float32)
  expected = 20000 * distribution(logits.astype(np.float64), 1.0, top_k, top_p)
  rows = np.broadcast_to(logits, (20000, 8))
  draws = SAMPLE(KEY, rows, 1.0, top_p, top_k=top_k)
  counts = np.bincount(np.asarray(draws), minlength=8)
  drawn = expected > 0
  assert drawn.sum() == kept
  assert not counts[~drawn].any()
  statistic = (counts - expected)[drawn] ** 2 / expected[drawn]
  assert statistic.sum() < 24.3


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45])
def test_low_temperatures_are_greedy(temperature):
  logits = np.random.default_rng(0).integers(-9, 9, (64, 30))
  logits = logits.astype(np.float32)
  # A tie of the best goes to either, however cold; the first of two wins here.
  logits[np.arange(64), logits.argmax(-1)] += 0.5
  draws = SAMPLE(KEY, logits, temperature, 1.0, top_k=0)
  np.testing.assert_array_equal(draws, logits.argmax(-1))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"max_tokens": 0}, "max_tokens must be >= 1, not 0"),
    ({"temperature": -0.1}, "temperature must be >= 0, not -0.1"),
    ({"temperature": float("nan")}, "temperature must be >= 0, not nan"),
    ({"top_k": -1}, "top_k must be >= 0, not -1"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\], not 1.1"),
  ],
)
def test_bad_settings_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)


@pytest.mark.parametrize(
  "prompts, message",
  [
    ([], "there is no prompt"),
    ([[1], []], "prompt 2 is empty"),
    ([[1, 61]], "prompt 1 has the token id 61, .* vocabulary only 0 to 60"),
    ([[-1]], "prompt 1 has the token id -1"),
    ([[1] * 30], "prompt 1 of 30 tokens and 12 more exceed .* context of 40"),
  ],
)
def test_bad_prompts_are_refused(prompts, message):
  model = make(context=40)
  with pytest.raises(ValueError, match=message):
    generate(model, prompts, GREEDY, key=KEY)
