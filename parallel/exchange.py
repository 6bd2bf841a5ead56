"""Swaps head shards for sequence shards inside groups whose size is data.

Before the exchange each device of a group of s holds all heads of its own
tokens, after it whole sequences of 1 / s of the heads (DeepSpeed-Ulysses,
arXiv:2309.14509). Here s is a traced number: offsets and sizes of a ragged
all-to-all are computed from it, so one program serves every mix of groups. A
device sends (s - 1) / s of what it holds.

All functions run inside `jax.shard_map` over one axis of N devices.
"""

import functools

import jax
import jax.numpy as jnp


def ragged_all_to_all(x, starts, sizes, targets, received, axis):
  """Sends slices of rows to other devices; rows not received are zero.

  Args:
    x: (rows, ...).
    starts: int32 (N,), first row of the slice for each device.
    sizes: int32 (N,), its rows.
    targets: int32 (N,), the row of the receiver where the slice goes.
    received: int32 (N,), rows that come from each device.
    axis: name of the mesh axis.

  Returns:
    Array like x.
  """
  collective = functools.partial(jax.lax.ragged_all_to_all, axis_name=axis)
  return jax.lax.platform_dependent(
    *(x, jnp.zeros_like(x), starts, sizes, targets, received),
    # XLA's CPU backend has no such collective.
    cpu=functools.partial(_emulate, axis),
    default=collective,
  )


def _emulate(axis, x, output, starts, sizes, targets, _):
  """What the collective does, by gathering everything everywhere."""
  swap = lambda t: jax.lax.all_to_all(t, axis, 0, 0, tiled=True)
  starts, sizes, targets = swap(starts), swap(sizes), swap(targets)
  row = jnp.arange(output.shape[0])
  hit = (row[:, None] >= targets) & (row[:, None] < targets + sizes)
  source = hit.argmax(1)
  values = jax.lax.all_gather(x, axis)[
    source, starts[source] + row - targets[source]
  ]
  hit = hit.any(1).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(hit, values, output)


def _tables(degree, share, axis):
  """First row, rows and target row of what this device sends to each."""
  me = jax.lax.axis_index(axis)
  peers = jnp.arange(jax.lax.axis_size(axis), dtype=jnp.int32)
  base = me // degree * degree
  inside = peers // degree == me // degree
  place = lambda table: jnp.where(inside, table, 0).astype(jnp.int32)
  return place((peers - base) * share), place(share), place((me - base) * share)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(x, degree, share, axis):
  starts, sizes, targets = _tables(degree, share, axis)
  return ragged_all_to_all(x, starts, sizes, targets, sizes, axis)


# The exchange is a symmetric permutation: its inverse and its transpose both.
_exchange.defvjp(
  lambda x, degree, share, axis: (
    _exchange(x, degree, share, axis),
    (degree, share),
  ),
  lambda axis, tables, g: (_exchange(g, *tables, axis), None, None),
)


def exchange(x, degree, share, *, axis):
  """Sends `share` rows to each device of the group; its own inverse.

  Args:
    x: (rows, T, D). The group's j-th device gets rows j * share .. (j + 1) *
      share - 1 and has them at i * share if this is the i-th device.
    degree: devices of the group, s. A traced int32 scalar; or a Python int,
      the same on all devices, for which a plain all-to-all is compiled and
      rows must be s * share.
    share: rows for each device, s * share <= rows; the rest is not sent.
    axis: name of the mesh axis.

  Returns:
    (rows, T, D), zero beyond row s * share. Differentiable in x.
  """
  if not isinstance(degree, int):
    return _exchange(x, degree, share, axis)
  if degree == 1:
    return x
  return jax.lax.all_to_all(
    x, axis, 0, 0, axis_index_groups=_groups(degree, axis), tiled=True
  )


def exchange_kv(x, degree, rows, *, axis):
  """Exchanges key or value heads, of which there may be fewer than devices.

  Only as many copies of a head travel as the group needs: lcm(K, s) rows. At
  the receiver they are repeated to `rows`, so that shapes do not depend on s.
  The gradient of a head is the sum over its copies, in float32.

  Args:
    x: (K, T, D).
    degree: devices of the group, s, as in `exchange`.
    rows: a multiple of lcm(K, s) for every s in use.
    axis: name of the mesh axis.

  Returns:
    (rows, T, D); row = source_device_in_group * (rows // s) + local_head.
  """
  heads = x.shape[0]
  if rows == heads:
    return exchange(x, degree, rows // degree, axis=axis)
  travel = _lcm(heads, degree)
  row = jnp.arange(rows)
  x = _take(x, row * heads // travel)
  x = exchange(x, degree, travel // degree, axis=axis)
  source, head = jnp.divmod(row, rows // degree)
  return _take(x, source * (travel // degree) + head * travel // rows)


def _lcm(heads, degree):
  """Least common multiple with a power of two, which may be traced."""
  low = heads & -heads
  return heads // low * jnp.maximum(low, degree)


def _take(x, index):
  """x[index], whose gradient sums in float32; clips indices beyond x."""
  index = jnp.minimum(index, x.shape[0] - 1)
  return x.astype(jnp.float32)[index].astype(x.dtype)


def gather_group(x, degree, length, *, axis):
  """Returns the (length,) group's buffer of a per-token array x (T,).

  Args:
    x: (T,).
    degree: devices of the group, s, as in `exchange`.
    length: a multiple of T; only the first s * T entries have a meaning.
    axis: name of the mesh axis.
  """
  if isinstance(degree, int):
    if degree == 1:
      return x
    groups = _groups(degree, axis)
    return jax.lax.all_gather(x, axis, axis_index_groups=groups, tiled=True)
  everything = jax.lax.all_gather(x, axis, tiled=True)
  base = jax.lax.axis_index(axis) // degree * degree
  return jnp.roll(everything, -base * x.shape[0])[:length]


def _groups(degree, axis):
  devices = jax.lax.axis_size(axis)
  return [list(range(i, i + degree)) for i in range(0, devices, degree)]
