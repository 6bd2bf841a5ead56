"""Causal attention over packed documents whose layout is data.

A token i attends to the tokens start[i] <= k <= i of its buffer, so documents
packed one after another do not see each other, and how they are packed never
enters the compiled program. Neither does the number of devices that share a
buffer after DeepSpeed-Ulysses' head exchange (arXiv:2309.14509).
"""

import jax.numpy as jnp

from adaptax.pallas_kernels.packed_attention import (
  dispatch,
  groups,
  schedule,
)
from adaptax.pallas_kernels.packed_attention.dispatch import BACKENDS
from adaptax.pallas_kernels.packed_attention.schedule import key_blocks

__all__ = ["BACKENDS", "group_attention", "key_blocks", "packed_attention"]


def _check_shapes(q, k, v, layout):
  """Raises ValueError unless q, k and v have `layout` and fit one another."""
  axis = layout.index("H")
  if q.ndim != len(layout):
    raise ValueError(f"q must have axes ({', '.join(layout)}), got {q.shape}")
  if k.ndim != q.ndim:
    raise ValueError(f"k must have axes ({', '.join(layout)}), got {k.shape}")
  expected = *q.shape[:axis], k.shape[axis], *q.shape[axis + 1 :]
  if k.shape != expected or v.shape != expected:
    raise ValueError(
      f"k and v must be {expected} to fit q {q.shape}, got {k.shape} and"
      f" {v.shape}"
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    )
  if not k.shape[axis] or q.shape[axis] % k.shape[axis]:
    raise ValueError(
      f"query heads must be a multiple of KV heads, got {q.shape[axis]} and"
      f" {k.shape[axis]}"
    )


def _check_group(q, k, start, stop, degree):
  """Raises ValueError unless the buffer and the degree fit q and k."""
  tokens = q.shape[1]
  if start.ndim != 1 or start.shape != stop.shape or start.shape[0] % tokens:
    raise ValueError(
      f"start and stop must be (N * {tokens},), got {start.shape} and"
      f" {stop.shape}"
    )
  choices = groups.degrees(start.shape[0] // tokens, k.shape[0])
  if isinstance(degree, int) and degree not in choices:
    raise ValueError(
      f"degree {degree} must be one of {choices}: powers of two that divide"
      f" the {k.shape[0]} KV heads, at most {start.shape[0] // tokens} devices"
    )


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

  Only the output and its log-sum-exp are kept for the backward pass, under the
  checkpoint names "attention_out" and "attention_lse". As Pallas does, it needs
  check_vma=False in jax.shard_map.

  Args:
    q: (H, T, D); row = source_device_in_group * (H // degree) + local_head.
    k: (Hk, T, D), laid out alike; H % Hk == 0.
    v: like k.
    start: int32 (N * T,); where each token's document begins in the group's
      buffer of degree * T tokens; entries beyond are ignored.
    stop: int32 (N * T,); where it ends (exclusive).
    degree: int32 scalar, a power of two that divides Hk; may be traced.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(scores / softcap).
    window: if given, a token sees at most this many tokens, itself included;
      may be traced.
    backend: one of BACKENDS; "auto" suits the platform that the program is
      compiled for. "tpu" elsewhere than on a TPU runs the Pallas interpreter.
    block_q: query block length of the blockwise backends.
    block_kv: key block length of the blockwise backends.

  Returns:
    (H, T, D) in q's dtype. Differentiable in q, k and v.

  Raises:
    ValueError: shapes, degree, window, backend or blocks do not fit.
  """
  _check_shapes(q, k, v, ("H", "T", "D"))
  _check_group(q, k, start, stop, degree)
  tokens = q.shape[1]
  most = groups.degrees(start.shape[0] // tokens, k.shape[0])[-1] * tokens
  options = dispatch.Options(
    scale, softcap, backend, block_q, block_kv, row=most
  )
  start, stop = start[:most], stop[:most]
  return _attend(options, q, k, v, start, stop, degree, window)


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
    softcap: as for group_attention.
    window: as for group_attention.
    backend: as for group_attention.

  Returns:
    (rows, T, H, D) in q's dtype. Differentiable in q, k and v.

  Raises:
    ValueError: shapes, window or backend do not fit.
  """
  _check_shapes(q, k, v, ("rows", "T", "H", "D"))
  rows, tokens, _, dim = q.shape
  if start.shape != (rows, tokens):
    raise ValueError(f"start must be {(rows, tokens)}, got {start.shape}")
  scale = dim**-0.5 if scale is None else scale
  options = dispatch.Options(scale, softcap, backend, None, None, row=tokens)
  offset = jnp.arange(rows, dtype=jnp.int32)[:, None] * tokens
  start = (jnp.maximum(start, 0) + offset).reshape(-1)
  stop = schedule.document_stop(start)
  fold = lambda x: x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, dim)
  out = _attend(options, *map(fold, (q, k, v)), start, stop, 1, window)
  return out.reshape(-1, rows, tokens, dim).transpose(1, 2, 0, 3)


def _attend(options, q, k, v, start, stop, degree, window):
  dispatch.check(options, q, k)
  if isinstance(window, int) and window < 1:
    raise ValueError(f"window must be at least 1 token, got {window}")
  start, stop = schedule.visible(start, stop, window)
  degree = jnp.asarray(degree, jnp.int32)
  return dispatch.attention(options, start, stop, degree, q, k, v)
