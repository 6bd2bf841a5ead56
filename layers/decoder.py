"""A Llama-family decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Llama 1-3, SmolLM, Mistral, Qwen2 and Gemma-like models differ from one another
only in `DecoderConfig`. Attention is a function that the caller passes, so
that one model serves packed, cached and sequence-parallel execution.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptax.layers import rope
from adaptax.layers.stack import REMAT_POLICIES, apply_stack, stack
from adaptax.pallas_kernels.errors import unknown_name

Attend = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = (
  "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
  "num_kv_heads", "head_dim", "context",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and variant of a decoder; field names are those of the literature.

  Attributes:
    vocab_size: rows of the embedding.
    hidden_size: width of the residual stream.
    intermediate_size: width of the gated MLP.
    num_layers: blocks.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: width of a head; 0 means `hidden_size // num_heads`.
    context: tokens of context the model was made for.
    rope_theta: base of the rotary frequencies.
    rope_scaling: None or a `RopeScaling`.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output head is the embedding, transposed.
    qkv_bias: biases on q, k and v (Qwen2).
    out_bias: bias on the attention output.
    mlp_bias: biases on gate, up and down.
    activation: a key of `ACTIVATIONS`.
    embed_scale: the embedding is multiplied by this (Gemma: sqrt(hidden)).
    logit_softcap: c in c * tanh(logits / c), or None.
    attention_softcap: the same for attention scores.
    sliding_window: a query sees this many latest keys, itself included.
    dtype: of activations and matrix products: float32, bfloat16, float16 or
      float64.
    param_dtype: of the stored weights, one of the same.
    remat: `none` or a key of `layers.stack.REMAT_POLICIES`.
    scan_layers: False unrolls the blocks in Python; the state is the same.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int = 0
  context: int = 8192
  rope_theta: float = 10000.0
  rope_scaling: rope.RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  activation: str = "silu"
  embed_scale: float = 1.0
  logit_softcap: float | None = None
  attention_softcap: float | None = None
  sliding_window: int | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = True

  def __post_init__(self):
    if not self.head_dim and self.num_heads:
      object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
    for name in _SIZES:
      if (size := getattr(self, name)) < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads {self.num_kv_heads} does not divide num_heads"
        f" {self.num_heads}"
      )
    if self.activation not in ACTIVATIONS:
      raise unknown_name("activation", self.activation, ACTIVATIONS)
    for name in ("dtype", "param_dtype"):
      if (dtype := getattr(self, name)) not in _DTYPES:
        raise unknown_name(name, dtype, _DTYPES)
    if self.remat not in ("none", *REMAT_POLICIES):
      raise unknown_name("remat", self.remat, ("none", *REMAT_POLICIES))


def _linear(config: DecoderConfig, inputs, outputs, bias, rngs) -> nnx.Linear:
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nnx.initializers.normal(0.02),
    rngs=rngs,
  )


def _norm(config: DecoderConfig, rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.hidden_size,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Projections and rotation around the caller's attention function."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    self.q = _linear(c, c.hidden_size, queries, c.qkv_bias, rngs)
    self.k = _linear(c, c.hidden_size, keys, c.qkv_bias, rngs)
    self.v = _linear(c, c.hidden_size, keys, c.qkv_bias, rngs)
    self.o = _linear(c, queries, c.hidden_size, c.out_bias, rngs)

  def __call__(self, x, cos_sin, attend: Attend, cache=None):
    """Maps x (rows, T, hidden) to the same shape and the updated cache."""
    c = self.config
    q, k, v = (
      linear(x).reshape(*x.shape[:-1], -1, c.head_dim)
      for linear in (self.q, self.k, self.v)
    )
    q, k = rope.rotate(q, cos_sin), rope.rotate(k, cos_sin)
    if cache is not None:
      cache = cache.append(k, v)
      k, v = cache.keys, cache.values
    out = attend(
      q,
      k,
      v,
      scale=c.head_dim**-0.5,
      softcap=c.attention_softcap,
      window=c.sliding_window,
    )
    return self.o(out.reshape(*x.shape[:-1], -1)), cache


class MLP(nnx.Module):
  """The gated MLP: down(activation(gate(x)) * up(x))."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    c = config
    self.activation = c.activation
    self.gate = _linear(c, c.hidden_size, c.intermediate_size, c.mlp_bias, rngs)
    self.up = _linear(c, c.hidden_size, c.intermediate_size, c.mlp_bias, rngs)
    self.down = _linear(c, c.intermediate_size, c.hidden_size, c.mlp_bias, rngs)

  def __call__(self, x):
    return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Pre-norm residual attention and MLP."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x, cos_sin, attend: Attend, cache=None):
    out, cache = self.attention(self.attention_norm(x), cos_sin, attend, cache)
    x = x + out
    return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
  """Tokens to next-token logits.

  `gather` and `constrain` are how a sharding scheme reaches into the forward
  pass: the first is applied to a block's weights where they are used, the
  second to the residual stream (rows, T, hidden) between blocks. `fetch_ends`
  applies `gather_ends` to the weights outside of the blocks.
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.gather: Callable[[Any], Any] | None = None
    self.gather_ends: Callable[[Any], Any] = _identity
    self.constrain: Callable[[jax.Array], jax.Array] = _identity
    self.embed = nnx.Embed(
      config.vocab_size,
      config.hidden_size,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      embedding_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.layers = stack(
      lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs
    )
    self.norm = _norm(config, rngs)
    if not config.tie_embeddings:
      self.head = _linear(
        config, config.hidden_size, config.vocab_size, False, rngs
      )

  def __call__(self, tokens, positions, attend: Attend) -> jax.Array:
    """Returns logits (rows, T, vocab).

    Args:
      tokens: int32 (rows, T).
      positions: int32 (rows, T), restarting at zero in every document.
      attend: `attend(q, k, v, *, scale, softcap, window) -> o` on arrays
        (rows, T, heads, head_dim), causal inside each document.
    """
    return self.logits(self.features(tokens, positions, attend))

  def features(self, tokens, positions, attend: Attend) -> jax.Array:
    """Returns the normalised last hidden state (rows, T, hidden)."""
    return self._forward(tokens, positions, attend, None)[0]

  def decode(self, tokens, positions, attend: Attend, cache):
    """Returns logits and the updated cache.

    Args:
      tokens: int32 (rows, T), the tokens that the cache lacks.
      positions: int32 (rows, T).
      attend: called with the keys and values of the whole cache.
      cache: a pytree with a leading layer axis whose per-layer slice has
        `append(k, v)`, `keys` and `values`.
    """
    features, cache = self._forward(tokens, positions, attend, cache)
    return self.logits(features), cache

  def fetch_ends(self) -> None:
    """Gathers the weights outside of the blocks, once for all their uses."""
    for name in ("embed", "norm", "head"):
      if module := getattr(self, name, None):
        nnx.update(module, self.gather_ends(nnx.state(module)))

  def logits(self, features) -> jax.Array:
    """Applies the output head to features (..., hidden)."""
    c = self.config
    if c.tie_embeddings:
      logits = self.embed.attend(features)
    else:
      logits = self.head(features)
    if c.logit_softcap is not None:
      logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    return logits

  def _forward(self, tokens, positions, attend, cache):
    c = self.config
    inverse = rope.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    cos_sin = rope.rotation(positions, inverse)
    x = self.embed(tokens)
    if c.embed_scale != 1.0:
      x = x * jnp.asarray(c.embed_scale, x.dtype)

    def step(block, x, cache):
      x, cache = block(self.constrain(x), cos_sin, attend, cache)
      return self.constrain(x), cache

    x, cache = apply_stack(
      self.layers,
      step,
      self.constrain(x),
      cache,
      remat=c.remat,
      unroll=not c.scan_layers,
      gather=self.gather,
    )
    return self.norm(x), cache


def _identity(x):
  return x
