"""Blockwise attention in plain lax: no S x S matrix, work follows documents.

The loop over key blocks runs from the block where the first document of the
query block begins to the diagonal, so short documents cost little.
"""

import jax
import jax.numpy as jnp

from adaptax.pallas_kernels.packed_attention.reference import MASKED


def default_block(row, platform):
  """Small blocks skip more, large ones keep a GPU or all cores busy.

  Args:
    row: tokens of the longest stretch that one document can span.
    platform: "cpu" or another.
  """
  if platform != "cpu":
    return 512
  return 64 if row <= 1024 else 128


def _dot(a, b, axis_a, axis_b):
  """Batched over the KV heads, float32 result."""
  dims = (((axis_a,), (axis_b,)), ((0,), (0,)))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _add(x, index, block):
  return jax.lax.dynamic_update_index_in_dim(x, x[index] + block, index, 0)


def _cut(x, kv_heads, block):
  """(H, S, D) -> (blocks, Hk, G * block, D); zeros fill the last block."""
  heads, tokens, dim = x.shape
  x = jnp.pad(x, ((0, 0), (0, -tokens % block), (0, 0)))
  x = x.reshape(kv_heads, heads // kv_heads, -1, block, dim)
  return x.transpose(2, 0, 1, 3, 4).reshape(x.shape[2], kv_heads, -1, dim)


def _join(x, heads, tokens):
  """The inverse of `_cut`."""
  blocks, kv_heads, _, dim = x.shape
  x = x.reshape(blocks, kv_heads, heads // kv_heads, -1, dim)
  return x.transpose(1, 2, 0, 3, 4).reshape(heads, -1, dim)[:, :tokens]


def _query_blocks(start, block_q, block_kv):
  """Position and `start` of each query, and each block's range of key blocks."""
  blocks = -(-start.shape[0] // block_q)
  index = jnp.arange(blocks * block_q, dtype=jnp.int32)
  start = jnp.concatenate([start, index[start.shape[0] :]])
  index, start = index.reshape(blocks, -1), start.reshape(blocks, -1)
  key_blocks = -(-index.size // block_kv)
  last = jnp.minimum(index[:, -1] // block_kv + 1, key_blocks)
  return index, start, start.min(1) // block_kv, last


def _scores(q, k, index, start, kv_block, scale, softcap):
  """Masked float32 scores (Hk, G * bq, bk), and the soft cap's derivative."""
  block_kv = k.shape[1]
  scores, slope = _dot(q, k, 2, 2) * scale, 1.0
  if softcap is not None:
    capped = jnp.tanh(scores / softcap)
    scores, slope = softcap * capped, 1 - capped**2
  key = kv_block * block_kv + jnp.arange(block_kv)
  mask = (key <= index[:, None]) & (key >= start[:, None])
  grouped = scores.reshape(q.shape[0], -1, *mask.shape)
  return jnp.where(mask, grouped, MASKED).reshape(scores.shape), slope


def forward(start, q, k, v, *, scale, softcap, block_q, block_kv):
  """Like reference.forward, in blocks of `block_q` by `block_kv` tokens."""
  (heads, tokens, _), kv_heads = q.shape, k.shape[0]
  qs = _cut(q, kv_heads, block_q)
  ks, vs = (_cut(x, kv_heads, block_kv) for x in (k, v))

  def query_block(block):
    q, index, start, first, last = block

    def key_block(j, carry):
      top, total, acc = carry
      scores, _ = _scores(q, ks[j], index, start, j, scale, softcap)
      new = jnp.maximum(top, scores.max(-1, keepdims=True))
      weights, decay = jnp.exp(scores - new), jnp.exp(top - new)
      total = decay * total + weights.sum(-1, keepdims=True)
      acc = decay * acc + _dot(weights.astype(v.dtype), vs[j], 2, 1)
      return new, total, acc

    column = jnp.zeros((*q.shape[:2], 1), jnp.float32)
    carry = column + MASKED, column, jnp.zeros(q.shape, jnp.float32)
    top, total, acc = jax.lax.fori_loop(first, last, key_block, carry)
    return (acc / total).astype(q.dtype), top + jnp.log(total)

  blocks = (qs, *_query_blocks(start, block_q, block_kv))
  out, lse = jax.lax.map(query_block, blocks)
  return _join(out, heads, tokens), _join(lse, heads, tokens)[..., 0]


def backward(start, q, k, v, out, lse, g, *, scale, softcap, block_q, block_kv):
  """Like reference.backward, in blocks of `block_q` by `block_kv` tokens."""
  (heads, tokens, _), kv_heads = q.shape, k.shape[0]
  delta = (out.astype(jnp.float32) * g).sum(-1)
  rows = (q, g, lse[..., None], delta[..., None])
  rows = [_cut(x, kv_heads, block_q) for x in rows]
  ks, vs = (_cut(x, kv_heads, block_kv) for x in (k, v))

  def query_block(grads, block):
    q, g, lse, delta, index, start, first, last = block

    def key_block(j, carry):
      dq, dk, dv = carry
      scores, slope = _scores(q, ks[j], index, start, j, scale, softcap)
      weights = jnp.exp(scores - lse)
      ds = weights * (_dot(g, vs[j], 2, 2) - delta) * slope * scale
      ds = ds.astype(q.dtype)
      dq += _dot(ds, ks[j], 2, 1)
      dk = _add(dk, j, _dot(ds, q, 1, 1))
      return dq, dk, _add(dv, j, _dot(weights.astype(g.dtype), g, 1, 1))

    carry = (jnp.zeros(q.shape, jnp.float32), *grads)
    dq, *grads = jax.lax.fori_loop(first, last, key_block, carry)
    return tuple(grads), dq.astype(q.dtype)

  zeros = jnp.zeros(ks.shape, jnp.float32)
  blocks = (*rows, *_query_blocks(start, block_q, block_kv))
  (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), blocks)
  dk, dv = (_join(x, kv_heads, tokens).astype(k.dtype) for x in (dk, dv))
  return _join(dq, heads, tokens), dk, dv
