"""Causal attention over packed documents whose layout is data.

A token i attends to the tokens start[i] <= k <= i of its buffer, so documents
packed one after another do not see each other, and how they are packed never
enters the compiled program.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from adaptax.pallas_kernels.packed_attention import reference

BACKENDS = ("auto", "reference", "xla", "tpu")


def _check(q, k, v, heads_axis, window, backend):
  """Raises ValueError on shapes that attention cannot take."""
  if q.ndim != k.ndim or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
    raise ValueError(
      f"k and v must have one shape and q's dim: {q.shape=} {k.shape=} {v.shape=}"
    )
  heads, kv_heads = q.shape[heads_axis], k.shape[heads_axis]
  if heads % kv_heads:
    raise ValueError(f"{heads=} must be a multiple of {kv_heads=}")
  if window is not None and window < 1:
    raise ValueError(f"window must be at least 1 token, got {window}")
  if backend not in BACKENDS:
    raise ValueError(f"unknown backend {backend!r}; use one of {BACKENDS}")


def _merge(x, degree):
  """(H, T, ...) of a group -> (H // degree, degree * T, ...) whole sequences."""
  heads, tokens, *rest = x.shape
  x = x.reshape(degree, heads // degree, tokens, *rest).swapaxes(0, 1)
  return x.reshape(heads // degree, degree * tokens, *rest)


def _split(x, degree):
  """The inverse of `_merge`."""
  heads, tokens, *rest = x.shape
  x = x.reshape(heads, degree, tokens // degree, *rest).swapaxes(0, 1)
  return x.reshape(heads * degree, tokens // degree, *rest)


def _by_degree(function, arrays, bounds, degree):
  """Calls `function` on whole sequences; one branch a possible degree."""
  kv_heads = min(x.shape[0] for x in arrays)
  tokens = arrays[0].shape[1]
  devices = bounds[0].shape[0] // tokens
  degrees = [1]
  while 2 * degrees[-1] <= devices and kv_heads % (2 * degrees[-1]) == 0:
    degrees.append(2 * degrees[-1])

  def branch(degree, *arrays):
    local = [_merge(x, degree) for x in arrays]
    ends = [x[: degree * tokens] for x in bounds]
    return tuple(_split(x, degree) for x in function(*local, *ends))

  branches = [functools.partial(branch, d) for d in degrees]
  index = jnp.log2(degree.astype(jnp.float32)).astype(jnp.int32)
  return jax.lax.switch(index, branches, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, start, stop, degree):
  return _forward(options, q, k, v, start, stop, degree)[0]


def _forward(options, q, k, v, start, stop, degree):
  run = functools.partial(reference.forward, **dict(options))
  out, lse = _by_degree(run, (q, k, v), (start,), degree)
  # Named so that a remat policy can keep them and never repeat the forward.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return out, (q, k, v, start, stop, degree, out, lse)


def _backward(options, residuals, g):
  q, k, v, start, _, degree, out, lse = residuals

  def run(q, k, v, out, lse, g, start):
    return reference.backward(q, k, v, start, out, lse, g, **dict(options))

  arrays = (q, k, v, out, lse, g)
  return *_by_degree(run, arrays, (start,), degree), None, None, None


_attention.defvjp(_forward, _backward)


def group_attention(
  q,
  k,
  v,
  start,
  stop,
  degree,
  *,
  scale,
  softcap=None,
  window=None,
  backend="auto",
  block_q=None,
  block_kv=None,
):
  """Attention of one device's share of heads over its group's packed buffer.

  Args:
    q: (H, T, D); row = source_device_in_group * (H // degree) + local_head.
    k: (Hk, T, D), laid out alike; H % Hk == 0.
    v: like k.
    start: int32 (N * T,); where each token's document begins in the group's
      buffer of degree * T tokens; entries beyond are ignored.
    stop: int32 (N * T,); where it ends (exclusive).
    degree: int32 scalar, a power of two; may be traced.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(scores / softcap).
    window: if given, a token sees at most this many tokens, itself included.
    backend: one of BACKENDS.
    block_q: query block length of the blockwise backends.
    block_kv: key block length of the blockwise backends.

  Returns:
    (H, T, D) in q's dtype. Differentiable in q, k and v.
  """
  del block_q, block_kv
  _check(q, k, v, 0, window, backend)
  index = jnp.arange(start.shape[0], dtype=jnp.int32)
  # No row is ever fully masked: a token sees at least itself.
  start, stop = jnp.minimum(start, index), jnp.maximum(stop, index + 1)
  if window is not None:
    start = jnp.maximum(start, index - window + 1)
    stop = jnp.minimum(stop, index + window)
  options = (("scale", scale), ("softcap", softcap))
  degree = jnp.asarray(degree, jnp.int32)
  return _attention(options, q, k, v, start, stop, degree)


def packed_attention(
  q, k, v, start, *, scale=None, softcap=None, window=None, backend="auto"
):
  """Causal attention in which each token sees its own document only.

  Args:
    q: (rows, T, H, D).
    k: (rows, T, Hk, D), H % Hk == 0; query head h uses KV head h // (H // Hk).
    v: like k.
    start: int32 (rows, T); the index in its row where each token's document
      begins; a padding token's own index.
    scale: factor on the scores; D**-0.5 if None.
    softcap: if given, scores become softcap * tanh(scores / softcap).
    window: if given, a token sees at most this many tokens, itself included.
    backend: one of BACKENDS.

  Returns:
    (rows, T, H, D) in q's dtype. Differentiable in q, k and v.
  """
  _check(q, k, v, 2, window, backend)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  run = functools.partial(
    group_attention, degree=1, scale=scale, softcap=softcap, window=window
  )
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  return jax.vmap(lambda q, k, v, s: run(q, k, v, s, s))(
    q, k, v, start
  ).swapaxes(1, 2)
