"""Attention of a model whose rows are spread over groups of devices."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adaptax.pallas_kernels.errors import unknown_name
from adaptax.pallas_kernels.packed_attention import group_attention
from adaptax.parallel.exchange import exchange, exchange_kv, gather_group
from adaptax.parallel.layout import Layout, exchange_limit
from adaptax.parallel.ring import ring_attention

EXECUTORS = ("mixed", "uniform")


def static_degree(layout: Layout, executor: str) -> int | None:
  """What of a layout the executor compiles for: a degree, or nothing.

  `mixed` takes the degrees as data, so one program serves every layout.
  `uniform` compiles a program for each degree, at most log2(N) + 1 in all, and
  takes only layouts whose groups all have the same. Pass the result, if not
  None, as `make_attend`'s degree and to jit as a static argument.

  Raises:
    ValueError: for another executor, or a mixed layout under `uniform`.
  """
  if executor not in EXECUTORS:
    raise unknown_name("executor", executor, EXECUTORS)
  if executor == "mixed":
    return None
  if layout.uniform_degree is None:
    raise ValueError(
      "the uniform executor needs one degree for all devices, the layout has"
      f" {sorted(set(layout.degree))}; use the mixed one"
    )
  return layout.uniform_degree


def make_attend(
  mesh: Mesh,
  axis: str,
  degree,
  start,
  stop,
  *,
  max_degree: int | None = None,
  ring: bool = False,
  **kernel,
):
  """Returns the attention function of a model for one micro-batch.

  Call it inside the jitted step, once, before the model.

  Args:
    mesh: of N devices along `axis`.
    axis: name of the mesh axis that rows are sharded over.
    degree: (N,) int32 as in `Layout.arrays`: one program for every layout. Or
      a Python int, the degree of all groups: a program for this degree, whose
      exchange is a plain all-to-all among equal groups.
    start: (N, T) int32 as in `Layout.arrays`.
    stop: (N, T) int32.
    max_degree: the widest group of any layout of this program; N if None. Few
      key and value heads are repeated up to it.
    ring: allow degrees above `exchange_limit(heads)`; T must be even.
    **kernel: `backend`, `block_q` and `block_kv` of `group_attention`.

  Returns:
    `attend(q, k, v, *, scale, softcap=None, window=None)` on arrays (N, T,
    heads, D), one row a device. A degree that the heads do not allow cannot be
    seen here where it is data: `Layout` refuses it.

  Raises:
    ValueError: if rows or tokens do not match, or a Python degree is too wide.
  """
  devices, tokens = start.shape
  if devices != mesh.shape[axis]:
    raise ValueError(
      f"a layout of {devices} devices does not fit the {mesh.shape[axis]} of"
      f" mesh axis {axis!r}"
    )
  if ring and tokens % 2:
    raise ValueError(f"a ring needs an even number of tokens, got {tokens}")
  if devices == 1:
    degree = 1
  static = degree if isinstance(degree, int) else None
  widest = static or 1 << min(max_degree or devices, devices).bit_length() - 1
  degrees = jnp.broadcast_to(jnp.asarray(degree, jnp.int32), (devices,))
  row, everywhere = PartitionSpec(axis), PartitionSpec()
  spread = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  mine = lambda degrees: static or degrees[jax.lax.axis_index(axis)]

  def gather(degrees, *bounds):
    return tuple(
      gather_group(x[0], mine(degrees), widest * tokens, axis=axis)[None]
      for x in bounds
    )

  # Gathered here so that it happens once, not in every layer.
  bounds = spread(
    gather, in_specs=(everywhere, row, row), out_specs=(row, row)
  )(degrees, start, stop)

  def attend(q, k, v, *, scale, softcap=None, window=None):
    limit = min(exchange_limit(q.shape[2]), widest)
    if q.shape[:2] != (devices, tokens):
      raise ValueError(
        f"attention takes one row a device, ({devices}, {tokens}, heads, dim);"
        f" got {q.shape}"
      )
    if static and static > limit and not ring:
      raise ValueError(
        f"degree {static} is above {limit}, the largest power of two that"
        f" divides {q.shape[2]} heads; turn the ring on"
      )
    options = dict(scale=scale, softcap=softcap, window=window)
    near = functools.partial(group_attention, **options, **kernel)
    far = functools.partial(ring_attention, axis=axis, width=limit, **options)
    group = functools.partial(
      _group, axis=axis, limit=limit, near=near, far=far if ring else None
    )

    def local(q, k, v, degrees, start, stop):
      q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
      steps = (static or degrees.max()) // limit
      out = group(q, k, v, start[0], stop[0], mine(degrees), steps)
      return out.swapaxes(0, 1)[None]

    return spread(
      local, in_specs=(row, row, row, everywhere, row, row), out_specs=row
    )(q, k, v, degrees, *bounds)

  return attend


def _group(q, k, v, start, stop, degree, steps, *, axis, limit, near, far):
  """One device's part: q (H, T, D), k and v (K, T, D) of its own tokens."""
  heads, tokens, _ = q.shape
  static = isinstance(degree, int)
  width = min(degree, limit) if static else jnp.minimum(degree, limit)
  rows = math.lcm(k.shape[0], width if static else limit)
  swap = lambda x: exchange(x, width, heads // width, axis=axis)
  q = swap(q)
  k, v = (exchange_kv(x, width, rows, axis=axis) for x in (k, v))

  def in_exchange():
    bounds = (x[: limit * tokens] for x in (start, stop))
    return near(q, k, v, *bounds, width)

  if static:
    narrow = degree <= limit
    out = in_exchange() if narrow else far(q, k, v, start, degree, steps)
  elif far is None:
    # Not silently wrong, should a layout for another model get here.
    out = jnp.where(degree > limit, jnp.nan, in_exchange())
  else:
    wide = degree > limit
    out = jax.lax.cond(wide, lambda: jnp.zeros_like(q), in_exchange)
    out = jnp.where(wide, far(q, k, v, start, degree, steps), out)
  return swap(out)
