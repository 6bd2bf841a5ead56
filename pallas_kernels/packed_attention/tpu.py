"""Pallas TPU kernels: work follows the documents through a traced grid.

Scores are kept transposed, (keys, G * queries): the softmax statistics are
then rows, reduced without crossing lanes, and every head size fills them. The
G query heads that share a KV head are rows of one matrix product.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adaptax.pallas_kernels.packed_attention import schedule
from adaptax.pallas_kernels.packed_attention.reference import MASKED

# Query rows (G * block_q) and keys of a block by head size.
BLOCKS = {64: (1024, 512), 96: (1024, 512), 128: (1024, 512), 256: (512, 512)}
# Query heads a KV head that fit VMEM at 128 queries.
GROUPS = 32
# Segments of the work list: two int32 lists of this length must fit SMEM.
CAPACITY = 1 << 14


def default_blocks(heads, kv_heads, tokens, dim):
  """Block lengths (block_q, block_kv) that divide `tokens`."""
  groups = heads // kv_heads
  rows, keys = BLOCKS.get(dim, BLOCKS[256])
  # With many query heads a KV head, 128 queries may be more rows than `rows`.
  keys = max(128, keys * rows // max(rows, groups * 128))
  fit = lambda size: math.gcd(1 << (size.bit_length() - 1), tokens)
  return fit(max(128, rows // groups)), fit(keys)


def problem(groups, tokens, dim, block_q, block_kv):
  """Why the kernels cannot take these sizes; None if they can."""
  if groups > GROUPS:
    return f"at most {GROUPS} query heads can share a KV head, got {groups}"
  if dim not in BLOCKS:
    return f"head size must be one of {list(BLOCKS)}, got {dim}"
  for name, size in (("block_q", block_q), ("block_kv", block_kv)):
    if size % 128 or tokens % size:
      return (
        f"{name} must be a multiple of 128 that divides the {tokens} tokens"
        f" a device, got {size}"
      )
  return None


def _dot(a, b, axis_a, axis_b):
  dims = (((axis_a,), (axis_b,)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scores(q, k, start, q_block, kv_block, scale, softcap):
  """Masked float32 scores (bk, G * bq), and the soft cap's derivative."""
  block_q = start.shape[1]
  scores, slope = _dot(k, q, 1, 1) * scale, 1.0
  if softcap is not None:
    capped = jnp.tanh(scores / softcap)
    scores, slope = softcap * capped, 1 - capped**2
  start = jnp.concatenate([start] * (q.shape[0] // block_q), axis=1)
  index = jax.lax.broadcasted_iota(jnp.int32, start.shape, 1)
  index = jax.lax.rem(index, jnp.full_like(index, block_q))
  key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  key += kv_block * k.shape[0]
  mask = (key <= index + q_block * block_q) & (key >= start)
  return jnp.where(mask, scores, MASKED), slope


def _rows(ref):
  """A (1, G, bq, D) block as (G * bq, D)."""
  return ref[0].reshape(-1, ref.shape[-1])


def _at(work):
  """This grid step's own block and its counterpart, with first and last."""
  _, block, begin, first, last = work
  segment = pl.program_id(1)
  own = block[segment]
  return own, begin[segment] + pl.program_id(2), first[own], last[own]


def _forward_kernel(*refs, scale, softcap):
  *work, start, q, k, v, out, lse, top, total, acc = refs
  q_block, kv_block, first, last = _at(work)

  @pl.when(kv_block == first)
  def _():
    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  @pl.when(kv_block <= last)
  def _():
    scores, _ = _scores(
      _rows(q), k[0], start[0], q_block, kv_block, scale, softcap
    )
    new = jnp.maximum(top[...], scores.max(0, keepdims=True))
    weights, decay = jnp.exp(scores - new), jnp.exp(top[...] - new)
    total[...] = decay * total[...] + weights.sum(0, keepdims=True)
    acc[...] = decay * acc[...] + _dot(v[0], weights.astype(v.dtype), 0, 0)
    top[...] = new

  @pl.when(kv_block == last)
  def _():
    result = (acc[...] / total[...]).T
    out[0] = result.reshape(out.shape[1:]).astype(out.dtype)
    lse[0, 0] = top[...] + jnp.log(total[...])


def _gradients(start, q, k, v, g, lse, delta, q_block, kv_block, options):
  """Softmax weights and the scores' gradient, both (bk, G * bq)."""
  scores, slope = _scores(
    _rows(q), k[0], start[0], q_block, kv_block, **options
  )
  weights = jnp.exp(scores - lse[0, 0])
  ds = weights * (_dot(v[0], _rows(g), 1, 1) - delta[0, 0]) * slope
  return weights, ds * options["scale"]


def _dq_kernel(*refs, **options):
  *work, start, q, k, v, g, lse, delta, dq, acc = refs
  q_block, kv_block, first, last = _at(work)

  @pl.when(kv_block == first)
  def _():
    acc[...] = jnp.zeros_like(acc)

  @pl.when(kv_block <= last)
  def _():
    _, ds = _gradients(
      start, q, k, v, g, lse, delta, q_block, kv_block, options
    )
    acc[...] += _dot(k[0], ds.astype(k.dtype), 0, 0)

  @pl.when(kv_block == last)
  def _():
    dq[0] = acc[...].T.reshape(dq.shape[1:]).astype(dq.dtype)


def _dkv_kernel(*refs, **options):
  *work, start, q, k, v, g, lse, delta, dk, dv, dk_acc, dv_acc = refs
  kv_block, q_block, first, last = _at(work)

  @pl.when(q_block == first)
  def _():
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  @pl.when(q_block <= last)
  def _():
    weights, ds = _gradients(
      start, q, k, v, g, lse, delta, q_block, kv_block, options
    )
    dv_acc[...] += _dot(weights.astype(g.dtype), _rows(g), 1, 0)
    dk_acc[...] += _dot(ds.astype(q.dtype), _rows(q), 1, 0)

  @pl.when(q_block == last)
  def _():
    dk[0] = dk_acc[...].astype(dk.dtype)
    dv[0] = dv_acc[...].astype(dv.dtype)


def _specs(shape, block_q, block_kv, by_query):
  """Block specs of q-like, row-like, k-like and `start` arrays."""
  _, groups, tokens, dim = shape

  def spec(block_shape, of_query, index):
    size = block_q if of_query else block_kv
    per_device = tokens // size

    def place(head, segment, step, share, block, begin, first, last):
      at = block[segment]
      if of_query != by_query:
        at = jnp.minimum(begin[segment] + step, last[at])
      source, local = jax.lax.div(at, per_device), jax.lax.rem(at, per_device)
      return index(at, source * share[0] + head, local)

    return pl.BlockSpec(block_shape, place)

  q_block, rows = (1, groups, block_q, dim), (1, 1, 1, groups * block_q)
  return {
    "q": spec(q_block, True, lambda at, row, block: (row, 0, block, 0)),
    "row": spec(rows, True, lambda at, row, block: (row, block, 0, 0)),
    "k": spec(
      (1, block_kv, dim), False, lambda at, row, block: (row, block, 0)
    ),
    "start": spec((1, 1, block_q), True, lambda at, row, block: (at, 0, 0)),
  }


def _call(kernel, shape, bounds, degree, inputs, outputs, scratch, **settings):
  """Runs a kernel over the work list of its blocks.

  Args:
    kernel: the body.
    shape: (Hk, G, T, D).
    bounds: `start`, if the list goes by query blocks, or `stop`, if by key.
    degree: int32 scalar.
    inputs: (kind of block spec, array) pairs.
    outputs: (kind of block spec, ShapeDtypeStruct) pairs.
    scratch: shapes of the float32 accumulators.
    **settings: block_q, block_kv, by_query, interpret.
  """
  block_q, block_kv = settings["block_q"], settings["block_kv"]
  by_query = settings["by_query"]
  specs = _specs(shape, block_q, block_kv, by_query)
  ranges = schedule.key_range if by_query else schedule.query_range
  first, last = ranges(bounds, block_q, block_kv)
  size, other = (block_q, block_kv) if by_query else (block_kv, block_q)
  # A `stop` beyond the group must not become an address beyond the array.
  last = jnp.minimum(last, degree * (shape[2] // other) - 1)
  most = first.shape[0] * (bounds.shape[0] // other)
  block, begin, count, length = schedule.segments(
    first,
    last,
    degree * (shape[2] // size),
    max(first.shape[0], min(CAPACITY, most)),
  )
  share = shape[0] // degree
  return pl.pallas_call(
    kernel,
    out_shape=[struct for _, struct in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(share, count, length),
      in_specs=[specs[kind] for kind, _ in inputs],
      out_specs=[specs[kind] for kind, _ in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary")
    ),
    interpret=settings["interpret"],
  )(share[None], block, begin, first, last, *(array for _, array in inputs))


def _to_rows(x, kv_heads, block_q):
  """(H, T) -> (Hk, T // bq, 1, G * bq): one row a query block."""
  heads, tokens = x.shape
  x = x.reshape(kv_heads, heads // kv_heads, tokens // block_q, block_q)
  return x.swapaxes(1, 2).reshape(kv_heads, tokens // block_q, 1, -1)


def _from_rows(x, heads, block_q):
  """The inverse of `_to_rows`."""
  kv_heads, blocks = x.shape[:2]
  x = x.reshape(kv_heads, blocks, heads // kv_heads, block_q).swapaxes(1, 2)
  return x.reshape(heads, -1)


def _shapes(q, k, block_q):
  """(Hk, G, T, D) and the shape of a row array."""
  (heads, tokens, dim), kv_heads = q.shape, k.shape[0]
  groups = heads // kv_heads
  rows = (kv_heads, tokens // block_q, 1, groups * block_q)
  return (kv_heads, groups, tokens, dim), rows


def forward(
  start, stop, degree, q, k, v, *, block_q, block_kv, interpret, **options
):
  """Returns the output (H, T, D) and its float32 log-sum-exp (H, T).

  Args:
    start: int32 (N * T,), clipped by schedule.visible.
    stop: not used.
    degree: int32 scalar.
    q: queries (H, T, D) as group_attention takes them.
    k: keys (Hk, T, D).
    v: values (Hk, T, D).
    block_q: query block length, a multiple of 128 that divides T.
    block_kv: key block length, likewise.
    interpret: run the Pallas interpreter.
    **options: scale and softcap.
  """
  del stop
  shape, rows = _shapes(q, k, block_q)
  out, lse = _call(
    functools.partial(_forward_kernel, **options),
    shape,
    start,
    degree,
    inputs=[
      ("start", start.reshape(-1, 1, block_q)),
      ("q", q.reshape(shape)),
      ("k", k),
      ("k", v),
    ],
    outputs=[
      ("q", jax.ShapeDtypeStruct(shape, q.dtype)),
      ("row", jax.ShapeDtypeStruct(rows, jnp.float32)),
    ],
    scratch=[(1, rows[-1]), (1, rows[-1]), (shape[-1], rows[-1])],
    by_query=True,
    block_q=block_q,
    block_kv=block_kv,
    interpret=interpret,
  )
  return out.reshape(q.shape), _from_rows(lse, q.shape[0], block_q)


def backward(
  start,
  stop,
  degree,
  q,
  k,
  v,
  out,
  lse,
  g,
  *,
  block_q,
  block_kv,
  interpret,
  **options,
):
  """Returns the gradients of q, k and v, given that of `out`."""
  shape, rows = _shapes(q, k, block_q)
  delta = (out.astype(jnp.float32) * g).sum(-1)
  row = lambda x: _to_rows(x, shape[0], block_q)
  inputs = [
    ("start", start.reshape(-1, 1, block_q)),
    ("q", q.reshape(shape)),
    ("k", k),
    ("k", v),
    ("q", g.reshape(shape)),
    ("row", row(lse)),
    ("row", row(delta)),
  ]
  run = functools.partial(
    _call,
    shape=shape,
    degree=degree,
    inputs=inputs,
    block_q=block_q,
    block_kv=block_kv,
    interpret=interpret,
  )
  (dq,) = run(
    functools.partial(_dq_kernel, **options),
    bounds=start,
    outputs=[("q", jax.ShapeDtypeStruct(shape, q.dtype))],
    scratch=[(shape[-1], rows[-1])],
    by_query=True,
  )
  like = jax.ShapeDtypeStruct(k.shape, k.dtype)
  dk, dv = run(
    functools.partial(_dkv_kernel, **options),
    bounds=stop,
    outputs=[("k", like), ("k", like)],
    scratch=[(block_kv, shape[-1])] * 2,
    by_query=False,
  )
  return dq.reshape(q.shape), dk, dv
