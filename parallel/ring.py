"""Groups wider than the head count: a ring of keys on top of the exchange.

Heads can be exchanged among at most `width` devices, so a wider group is cut
into subgroups of `width`: the exchange runs inside each, then keys and values
travel around the ring of subgroups (USP, arXiv:2405.07719, on Ring Attention,
arXiv:2310.01889). Backward sends them around again with their gradients.

Causal work is balanced by the zigzag order in which `Layout` stores such a
group: a device holds a chunk of the front and its mirror image of the back,
and after its own keys every step is half a score matrix on every device. The
alternative, LightSeq's donated work (arXiv:2310.03294), needs no reordering
but sends queries and partial results to distant devices too, and leaves
1 / (s + 2) of the time idle. The balance is exact for one document that fills
the group; other documents cost what their blocks cost.

Neighbours and the number of steps are computed from `degree`, so the layout
stays data: only new shapes compile again, or a new degree where it is a
Python int.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from adaptax.parallel.exchange import ragged_all_to_all

# Finite, so that the difference of two masked scores is not NaN.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class _Options:
  """What is static; `degree` and `steps` are None where they are data."""

  axis: str
  width: int
  block: int
  scale: float
  softcap: float | None
  degree: int | None
  steps: int | None


def ring_attention(
  q,
  k,
  v,
  start,
  degree,
  steps,
  *,
  axis,
  width,
  scale,
  softcap=None,
  window=None,
  block=1024,
):
  """Causal attention over packed documents in groups wider than `width`.

  Runs inside `jax.shard_map`, between two exchanges in subgroups of `width`.

  Args:
    q: (H, T, D); row = source_device_in_subgroup * (H // width) + local_head.
    k: (Hk, T, D), laid out alike; H % Hk == 0.
    v: like k.
    start: int32 (>= degree * T,), where in the group's buffer the document of
      each token begins, device by device.
    degree: devices of this device's group: a traced int32 scalar, or a Python
      int that holds for all devices.
    steps: subgroups of the widest group of all devices, of the same kind.
    axis: name of the mesh axis.
    width: devices of a subgroup, a power of two.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(scores / softcap).
    window: if given, a token sees at most this many tokens, itself included.
    block: upper bound on the block length of queries and keys.

  Returns:
    (H, T, D) in q's dtype, zero on devices whose group is not wider than
    `width`. Differentiable in q, k and v; backward does not repeat forward,
    nor does rematerialisation that saves the names `attention_out` and
    `attention_lse`.
  """
  (heads, tokens, dim), kv_heads = q.shape, k.shape[0] // width
  rank = lax.axis_index(axis) % degree // width
  size = width * tokens
  lower = lax.dynamic_slice_in_dim(start, rank * size, size)
  if window is not None:
    index = _index(rank, degree, width, tokens)
    lower = jnp.maximum(lower, index - window + 1)
  half = tokens // 2
  block = max(b for b in range(1, min(half, block) + 1) if half % b == 0)
  static = (degree, steps) if isinstance(degree, int) else (None, None)
  options = _Options(axis, width, block, scale, softcap, *static)
  # Whole sequences of the subgroup: (Hk // width, H // Hk, width * T, D).
  merge = lambda x: (
    x.reshape(width, kv_heads, -1, tokens, dim)
    .transpose(1, 2, 0, 3, 4)
    .reshape(kv_heads, -1, width * tokens, dim)
  )
  kv = jnp.stack([merge(k)[:, 0], merge(v)[:, 0]])
  out = _attention(options, merge(q), kv, lower, degree, steps)
  return (
    out.reshape(kv_heads, -1, width, tokens, dim)
    .transpose(2, 0, 1, 3, 4)
    .reshape(heads, tokens, dim)
  )


def _index(rank, degree, width, tokens):
  """(width * T,) index in the group's buffer of a subgroup's tokens."""
  member = rank * width + jnp.arange(width, dtype=jnp.int32)[:, None]
  slot, half = jnp.arange(tokens, dtype=jnp.int32), tokens // 2
  chunk = jnp.where(slot < half, member, 2 * degree - 1 - member)
  return (chunk * half + slot % half).ravel()


def _rotate(options, x, degree):
  """Sends x to the same member of the next subgroup, in every wide group."""
  axis, width = options.axis, options.width
  peers = range(lax.axis_size(axis))

  def neighbour(device, distance):
    base = device // degree * degree
    return base + (device - base + distance) % degree

  if options.degree is not None:
    return lax.ppermute(x, axis, [(i, neighbour(i, width)) for i in peers])
  me, peers = lax.axis_index(axis), jnp.asarray(peers)
  sizes, received = (
    ((peers == neighbour(me, distance)) & (degree > width)).astype(jnp.int32)
    for distance in (width, -width)
  )
  zeros = jnp.zeros_like(sizes)
  return ragged_all_to_all(x[None], zeros, sizes, zeros, received, axis)[0]


def _turn(options, lower, degree, steps, pair, kv, stay, travel):
  """Runs `pair` on all blocks of queries and keys that see each other.

  Args:
    options: an `_Options`.
    lower: (S,), the first key in the group's buffer that each query sees.
    degree: as in `ring_attention`.
    steps: as in `ring_attention`.
    pair: `pair(mask, i, kv_j, stay_i, travel_j) -> stay_i, travel_j` for query
      block i and key block j.
    kv: (2, K, S, D), the keys and values to begin with, this device's own.
    stay: tuple of (..., S, n), what belongs to the queries.
    travel: tuple of (..., S, n), what accompanies the keys. It is at home
      again in the end, because every ring's length divides `steps`.

  Returns:
    stay and travel.
  """
  if options.degree is not None:
    degree, steps = options.degree, options.steps
  tokens, size = kv.shape[-2] // options.width, options.block
  rank = lax.axis_index(options.axis) % degree // options.width
  ring = jnp.maximum(degree // options.width, 1)
  index_of = lambda rank: _index(rank, degree, options.width, tokens)
  rows = lambda x: x.reshape(-1, size)
  lower, q_index = rows(lower), rows(index_of(rank))
  blocks = len(lower)

  def step(t, kv, stay, travel):
    k_index = rows(index_of((rank - t) % ring))

    def body(n, carry):
      stay, travel = carry
      i, j = n // blocks, n % blocks
      queries, keys, first = q_index[i], k_index[j], lower[i]
      mask = (keys <= queries[:, None]) & (keys >= first[:, None])
      cut = lambda xs, i: tuple(_get(x, i, size) for x in xs)
      # Only blocks enter the branches, whose operands are copied.
      stay_i, travel_j = lax.cond(
        # Indices ascend inside a block.
        (keys[0] <= queries[-1]) & (keys[-1] >= first[0]),
        pair,
        lambda mask, i, kv_j, *carry: carry,
        *(mask, i, _get(kv, j, size), cut(stay, i), cut(travel, j)),
      )
      put = lambda xs, ys, i: tuple(_put(x, y, i) for x, y in zip(xs, ys))
      return put(stay, stay_i, i), put(travel, travel_j, j)

    mine = (degree > options.width) & (t < ring)
    work = jnp.where(mine, blocks * blocks, 0)
    stay, travel = lax.fori_loop(0, work, body, (stay, travel))
    return stay, tuple(_rotate(options, x, degree) for x in travel)

  def body(t, carry):
    kv, stay, travel = carry
    # The next keys are under way while these are used.
    return _rotate(options, kv, degree), *step(t, kv, stay, travel)

  carry = lax.fori_loop(0, steps - 1, body, (kv, stay, travel))
  return step(steps - 1, *carry)


def _get(x, i, size):
  """Block i of the token axis, the last but one of (..., S, n)."""
  return lax.dynamic_slice_in_dim(x, i * size, size, x.ndim - 2)


def _put(x, block, i):
  size = block.shape[-2]
  return lax.dynamic_update_slice_in_dim(x, block, i * size, x.ndim - 2)


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _scores(options, mask, q, k):
  """Masked float32 scores (K, G, bq, bk) and the soft cap's derivative."""
  scores, slope = _dot("kgqd,ktd->kgqt", q, k) * options.scale, 1.0
  if options.softcap is not None:
    capped = jnp.tanh(scores / options.softcap)
    scores, slope = options.softcap * capped, 1 - capped**2
  return jnp.where(mask, scores, _MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, kv, lower, degree, steps):
  return _forward(options, q, kv, lower, degree, steps)[0]


def _forward(options, q, kv, lower, degree, steps):
  """Online softmax over the ring; q (K, G, S, D), kv (2, K, S, D)."""

  def pair(mask, i, kv_j, stay, travel):
    top, total, acc = stay
    scores, _ = _scores(options, mask, _get(q, i, options.block), kv_j[0])
    new = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights, decay = jnp.exp(scores - new), jnp.exp(top - new)
    total = decay * total + weights.sum(-1, keepdims=True)
    values = _dot("kgqt,ktd->kgqd", weights.astype(kv.dtype), kv_j[1])
    return (new, total, decay * acc + values), travel

  column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
  stay = column + _MASKED, column, jnp.zeros(q.shape, jnp.float32)
  stay, _ = _turn(options, lower, degree, steps, pair, kv, stay, ())
  top, total, acc = stay
  # Zero only where no ring ran: every token sees itself.
  total = jnp.where(total > 0, total, 1)
  # Named so that a remat policy can keep them and never repeat the forward.
  out = checkpoint_name((acc / total).astype(q.dtype), "attention_out")
  lse = checkpoint_name(top + jnp.log(total), "attention_lse")
  return out, (q, kv, lower, degree, steps, out, lse)


def _backward(options, residuals, g):
  q, kv, lower, degree, steps, out, lse = residuals
  delta = (out.astype(jnp.float32) * g).sum(-1, keepdims=True)

  def pair(mask, i, kv_j, stay, travel):
    (dq,), (dkv,), (k, v) = stay, travel, kv_j
    q_i, g_i, lse_i, delta_i = (
      _get(x, i, options.block) for x in (q, g, lse, delta)
    )
    scores, slope = _scores(options, mask, q_i, k)
    weights = jnp.exp(scores - lse_i)
    dv = _dot("kgqt,kgqd->ktd", weights.astype(g.dtype), g_i)
    ds = weights * (_dot("kgqd,ktd->kgqt", g_i, v) - delta_i) * slope
    ds = (ds * options.scale).astype(q.dtype)
    dq = dq + _dot("kgqt,ktd->kgqd", ds, k)
    dk = _dot("kgqt,kgqd->ktd", ds, q_i)
    return (dq,), (dkv + jnp.stack([dk, dv]),)

  zeros = lambda x: (jnp.zeros(x.shape, jnp.float32),)
  (dq,), (dkv,) = _turn(
    options, lower, degree, steps, pair, kv, zeros(q), zeros(kv)
  )
  return dq.astype(q.dtype), dkv.astype(kv.dtype), None, None, None


_attention.defvjp(_forward, _backward)
