"""Hashes of arrays where they lie, the same for every sharding."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_CHUNK = 2**18


def fingerprint(tree: Any) -> dict[str, int]:
  """Hashes every leaf on its devices: {path: 32 bits}.

  The sum modulo 2^32 of a hash of each element's bits and place. It sees any
  change of one element of at most 32 bits, misses another change with
  probability 2^-32, and is the same for every sharding. One pass at memory
  speed, no copy of a leaf.

  Args:
    tree: pytree of arrays and random keys.
  """
  hashes = {}
  for path, leaf in by_path(tree).items():
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    hashes[path] = _hash_leaf(leaf, leaf.sharding)
  return {path: int(value) for path, value in hashes.items()}


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by path, as in `layers/attention/q/kernel`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


@functools.partial(jax.jit, static_argnums=1)
def _hash_leaf(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  """Hashes each device's block where it is and adds up."""
  if not isinstance(sharding, NamedSharding):
    return _hash_block(x, x.shape, [0] * x.ndim)
  spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
  axes = [(a,) if isinstance(a, str) else a or () for a in spec]

  def hash_local(block):
    origin = [
      lax.axis_index(a) * n if a else 0 for a, n in zip(axes, block.shape)
    ]
    return lax.psum(_hash_block(block, x.shape, origin), sum(axes, ()))

  return jax.shard_map(
    hash_local,
    mesh=sharding.mesh,
    in_specs=sharding.spec,
    out_specs=PartitionSpec(),
    check_vma=False,
  )(x)


def _hash_block(block, shape, origin):
  """Hashes the block of an array of `shape` that begins at index `origin`.

  The loop over chunks keeps XLA from writing out the hash of each element.
  """
  strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
  first = sum(
    (jnp.uint32(i) * _wrap(s) for i, s in zip(origin, strides)), jnp.uint32(0)
  )
  outer, inner = _split(list(zip(block.shape, strides)))
  rows, columns = first + _places(outer), _places(inner)
  chunks = block.reshape(rows.size, columns.size)

  def hash_chunk(i):
    bits = _bits(lax.dynamic_index_in_dim(chunks, i, keepdims=False))
    return _mix(bits + (rows[i] + columns) * _wrap(0x9E3779B9))

  total = lax.fori_loop(
    0,
    rows.size,
    lambda i, total: total + hash_chunk(i),
    jnp.zeros_like(columns),
  )
  return jnp.sum(total, dtype=jnp.uint32)


def _split(dims):
  """Splits (size, stride) pairs into outer ones and at most a chunk inside."""
  inner, room = [], _CHUNK
  while dims and dims[-1][0] <= room:
    inner.insert(0, dims.pop())
    room //= max(inner[0][0], 1)
  if dims:
    size, stride = dims.pop()
    part = next(n for n in range(room, 0, -1) if size % n == 0)
    dims.append((size // part, stride * part))
    inner.insert(0, (part, stride))
  return dims, inner


def _places(dims):
  """Where each element of a block of (size, stride) pairs lies, row-major."""
  places = jnp.zeros(1, jnp.uint32)
  for size, stride in dims:
    steps = jnp.arange(size, dtype=jnp.uint32) * _wrap(stride)
    places = (places[:, None] + steps).reshape(-1)
  return places


def _wrap(value: int):
  return jnp.uint32(value % 2**32)


def _bits(x):
  """The bits of each element as 32 of them."""
  if jnp.issubdtype(x.dtype, jnp.inexact):
    x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  low = x.astype(jnp.uint32)
  if x.dtype.itemsize < 8:
    return low
  return low ^ _mix((x >> 32).astype(jnp.uint32))


def _mix(x):
  """The bijection lowbias32 of github.com/skeeto/hash-prospector."""
  x = (x ^ (x >> 16)) * _wrap(0x7FEB352D)
  x = (x ^ (x >> 15)) * _wrap(0x846CA68B)
  return x ^ (x >> 16)
