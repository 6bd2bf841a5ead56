"""KV-cache decoding with sampling, of one batch of prompts at a time."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptax.layers import DecoderConfig
from adaptax.pallas_kernels.packed_attention import packed_attention

# Lengths are rounded up to multiples of this, so that few programs serve all.
_MULTIPLE = 64


class Cache(NamedTuple):
  """Keys and values of the tokens so far, of all layers or of one.

  Attributes:
    keys: ([layers,] rows, width, kv_heads, head_dim).
    values: like keys.
    end: int32 ([layers]), the column that the next token goes to.
  """

  keys: jax.Array
  values: jax.Array
  end: jax.Array

  @classmethod
  def empty(cls, config: DecoderConfig, rows: int, width: int) -> "Cache":
    layers, heads = config.num_layers, config.num_kv_heads
    shape = layers, rows, width, heads, config.head_dim
    zeros = jnp.zeros(shape, config.dtype)
    return cls(zeros, zeros, jnp.zeros(layers, jnp.int32))

  def append(self, k, v) -> "Cache":
    """Returns one layer's cache with k and v (rows, T, kv_heads, head_dim)."""
    put = jax.lax.dynamic_update_slice_in_dim
    keys, values = (
      put(old, new, self.end, axis=1)
      for old, new in ((self.keys, k), (self.values, v))
    )
    return Cache(keys, values, self.end + k.shape[1])


def cached_attention(
  q, k, v, *, start, column, scale, softcap=None, window=None
) -> jax.Array:
  """Attention of each row's newest token to the tokens before it and itself.

  Args:
    q: (rows, 1, H, D).
    k: (rows, width, K, D); query head h uses key head h // (H // K).
    v: like k.
    start: int32 (rows,), the column of a row's first token.
    column: int32 scalar, that of the newest token.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(scores / softcap).
    window: if given, the number of columns seen, the newest included.
  """
  rows, width, kv_heads, dim = k.shape
  grouped = q.reshape(rows, kv_heads, -1, dim)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = einsum("rhgd,rkhd->rhgk", grouped, k) * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if window is not None:
    start = jnp.maximum(start, column - window + 1)
  index = jnp.arange(width)
  seen = (index >= start[:, None]) & (index <= column)
  scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return einsum("rhgk,rkhd->rhgd", weights, v).reshape(q.shape).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: among the top k, and of these the nucleus.

  The nucleus is the smallest set of the likeliest tokens whose probability
  reaches `top_p` (Holtzman et al., 2020, arXiv:1904.09751).

  Attributes:
    max_tokens: length of a completion, at most.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: number of tokens kept; 0 keeps all.
    top_p: probability kept; 1 keeps all.
  """

  max_tokens: int = 64
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f"max_tokens must be >= 1, not {self.max_tokens}")
    if not self.temperature >= 0:
      raise ValueError(f"temperature must be >= 0, not {self.temperature}")
    if self.top_k < 0:
      raise ValueError(f"top_k must be >= 0, not {self.top_k}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


def candidates(logits, temperature, top_p, *, top_k: int):
  """Returns what may be drawn, best first.

  Args:
    logits: (rows, vocab).
    temperature: above 0.
    top_p: in (0, 1].
    top_k: 0 means vocab.

  Returns:
    float32 logits (rows, top_k), -inf outside the nucleus, and token ids.
  """
  vocab = logits.shape[-1]
  count = min(top_k or vocab, vocab)
  ranked, ids = jax.lax.top_k(logits.astype(jnp.float32), count)
  ranked = (ranked - ranked[:, :1]) / temperature
  # The tail is summed from its small end, where float32 loses nothing.
  tail = jax.lax.cumsum(jax.nn.softmax(ranked), axis=1, reverse=True)
  nucleus = (tail > 1 - top_p).at[:, 0].set(True)
  return jnp.where(nucleus, ranked, -jnp.inf), ids


def sample(key, logits, temperature, top_p, *, top_k: int) -> jax.Array:
  """Draws a token id for each row of logits (rows, vocab)."""
  scores, ids = candidates(logits, temperature, top_p, top_k=top_k)
  choice = jax.random.categorical(key, scores)
  return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]


class Completions(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: int32 ids of each completion, without the end token.
    seconds: time of the decoding loop, compilation left out.
  """

  tokens: list[np.ndarray]
  seconds: float


def generate(
  model: Any,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling,
  *,
  key: jax.Array,
  eos_id: int | None = None,
) -> Completions:
  """Completes prompts of any lengths in one batch.

  Two programs are compiled for a model, a number of prompts, a `top_k` and
  lengths rounded up: one reads the prompts, one decodes.

  Args:
    model: a decoder in evaluation mode, on one device.
    prompts: token ids of each prompt.
    sampling: how tokens are drawn, and how many.
    key: a `jax.random.key`.
    eos_id: the token that ends a completion, if any.

  Raises:
    ValueError: an empty prompt, an id beyond the vocabulary, or more tokens
      than the model's context.
  """
  s = sampling
  _check(model.config, prompts, s.max_tokens)
  prefix = _round_up(max(map(len, prompts)))
  width = _round_up(prefix + s.max_tokens)
  tokens, start = _align(prompts, prefix, width + 1)
  graphdef, state = nnx.split(model)
  prompt = tokens[:, :prefix]
  cache = _prefill(graphdef, state, prompt, start, width=width)
  loop = _Loop(
    np.int32(prefix), tokens, np.zeros(len(tokens), bool), cache, key
  )
  last, eos = prefix + s.max_tokens, -1 if eos_id is None else eos_id
  # The likeliest token is the only one of the top 1, at any temperature.
  top_k = s.top_k if s.temperature else 1
  arguments = state, loop, start, last, eos, s.temperature or 1.0, s.top_p
  # Compiled apart, so that the clock sees only the loop.
  decode = _decode.lower(graphdef, *arguments, top_k=top_k).compile()
  jax.block_until_ready(cache)
  begin = time.perf_counter()
  found = np.asarray(decode(*arguments))
  seconds = time.perf_counter() - begin
  found = found[:, prefix + 1 : last + 1]
  return Completions([_until(row, eos) for row in found], seconds)


def _check(config: DecoderConfig, prompts, max_tokens: int) -> None:
  if not len(prompts):
    raise ValueError("there is no prompt")
  for number, prompt in enumerate(prompts, 1):
    if not len(prompt):
      raise ValueError(f"prompt {number} is empty")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
      bad = next(i for i in prompt if not 0 <= i < config.vocab_size)
      raise ValueError(
        f"prompt {number} has the token id {bad}, the model's vocabulary only"
        f" 0 to {config.vocab_size - 1}"
      )
    if len(prompt) + max_tokens > config.context:
      raise ValueError(
        f"prompt {number} of {len(prompt)} tokens and {max_tokens} more exceed"
        f" the model's context of {config.context}"
      )


def _round_up(length: int) -> int:
  return -(-length // _MULTIPLE) * _MULTIPLE


def _align(prompts, prefix: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts that end in column `prefix` of (rows, width), and their starts."""
  tokens = np.zeros((len(prompts), width), np.int32)
  start = np.array([prefix + 1 - len(p) for p in prompts], np.int32)
  for row, first, prompt in zip(tokens, start, prompts):
    row[first : prefix + 1] = prompt
  return tokens, start


def _until(tokens: np.ndarray, eos: int) -> np.ndarray:
  ends = np.flatnonzero(tokens == eos)
  return tokens[: ends[0]] if ends.size else tokens


@functools.partial(jax.jit, static_argnames=("graphdef", "width"))
def _prefill(graphdef, state, tokens, start, *, width: int) -> Cache:
  """Reads the prompts save their last tokens, which start the loop."""
  model = nnx.merge(graphdef, state)
  rows, length = tokens.shape
  columns, first = jnp.arange(length), start[:, None]

  def attend(q, k, v, **options):
    seen = jnp.minimum(first, columns)
    return packed_attention(q, k[:, :length], v[:, :length], seen, **options)

  positions = jnp.maximum(columns - first, 0)
  cache = Cache.empty(model.config, rows, width)
  return model.decode(tokens, positions, attend, cache)[1]


class _Loop(NamedTuple):
  """What a step of decoding changes; `column` is that of the newest tokens."""

  column: Any
  tokens: Any
  done: Any
  cache: Cache
  key: jax.Array


@functools.partial(jax.jit, static_argnames=("graphdef", "top_k"))
def _decode(
  graphdef, state, loop, start, last, eos, temperature, top_p, *, top_k
):
  """Fills the tokens up to column `last`, or until all rows are done."""
  model = nnx.merge(graphdef, state)

  def step(loop):
    column = loop.column
    token = jax.lax.dynamic_slice_in_dim(loop.tokens, column, 1, axis=1)
    attend = functools.partial(cached_attention, start=start, column=column)
    logits, cache = model.decode(
      token, (column - start)[:, None], attend, loop.cache
    )
    key, subkey = jax.random.split(loop.key)
    chosen = sample(subkey, logits[:, 0], temperature, top_p, top_k=top_k)
    chosen = jnp.where(loop.done, eos, chosen)
    tokens = jax.lax.dynamic_update_slice_in_dim(
      loop.tokens, chosen[:, None], column + 1, axis=1
    )
    return _Loop(column + 1, tokens, loop.done | (chosen == eos), cache, key)

  going = lambda loop: (loop.column < last) & ~loop.done.all()
  return jax.lax.while_loop(going, step, loop).tokens
