"""Dense causal attention over packed documents: the truth, in plain jnp."""

import jax.numpy as jnp

# Finite, so that a masked score minus a masked maximum is not NaN.
MASKED = -1e30


def _scores(q, k, start, scale, softcap):
  """Masked float32 scores (Hk, G, S, S), and the soft cap's derivative."""
  (heads, tokens, dim), kv_heads = q.shape, k.shape[0]
  q = q.reshape(kv_heads, -1, dim) * scale
  scores = jnp.einsum("hqd,hkd->hqk", q, k)
  scores = scores.reshape(kv_heads, heads // kv_heads, tokens, tokens)
  slope = 1.0
  if softcap is not None:
    capped = jnp.tanh(scores / softcap)
    scores, slope = softcap * capped, 1 - capped**2
  index = jnp.arange(tokens)
  mask = (index <= index[:, None]) & (index >= start[:, None])
  return jnp.where(mask, scores, MASKED), slope


def forward(start, q, k, v, *, scale, softcap=None):
  """Returns the output (H, S, D) and its float32 log-sum-exp (H, S).

  Args:
    start: int32 (S,), the first token that each token attends to.
    q: queries (H, S, D).
    k: keys (Hk, S, D), H % Hk == 0; query head h uses key head h // (H // Hk).
    v: values (Hk, S, D).
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(scores / softcap).
  """
  dtype, heads = q.dtype, q.shape[0]
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  scores, _ = _scores(q, k, start, scale, softcap)
  top = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  out = jnp.einsum("hgqk,hkd->hgqd", weights, v) / total
  lse = (top + jnp.log(total)).reshape(heads, -1)
  return out.reshape(q.shape).astype(dtype), lse


def backward(start, q, k, v, out, lse, g, *, scale, softcap=None):
  """Returns the gradients of q, k and v, given that of `out`."""
  dtypes, kv_heads = [x.dtype for x in (q, k, v)], k.shape[0]
  q, k, v, out, g = (x.astype(jnp.float32) for x in (q, k, v, out, g))
  scores, slope = _scores(q, k, start, scale, softcap)
  weights = jnp.exp(scores - lse.reshape(*scores.shape[:-1], 1))
  delta = (out * g).sum(-1).reshape(*scores.shape[:-1], 1)
  grouped = lambda x: x.reshape(kv_heads, -1, x.shape[-1])
  weights, g = grouped(weights), grouped(g)
  dv = jnp.einsum("hqk,hqd->hkd", weights, g)
  dp = jnp.einsum("hqd,hkd->hqk", g, v)
  ds = weights * (dp - grouped(delta))
  if softcap is not None:
    ds = ds * grouped(slope)
  dq = jnp.einsum("hqk,hkd->hqd", ds, k).reshape(q.shape) * scale
  dk = jnp.einsum("hqk,hqd->hkd", ds, grouped(q) * scale)
  return tuple(x.astype(t) for x, t in zip((dq, dk, dv), dtypes))
