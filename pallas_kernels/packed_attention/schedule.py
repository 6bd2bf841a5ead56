"""Which blocks of a packed buffer meet: ranges, work lists and their count."""

import jax
import jax.numpy as jnp


def visible(start, stop, window=None):
  """Clips `start` and `stop` so that each token sees itself, and the window."""
  index = jnp.arange(start.shape[0], dtype=jnp.int32)
  start, stop = start.astype(jnp.int32), stop.astype(jnp.int32)
  start, stop = jnp.clip(start, 0, index), jnp.maximum(stop, index + 1)
  if window is not None:
    window = jnp.minimum(window, start.shape[0])
    start = jnp.maximum(start, index - window + 1)
    stop = jnp.minimum(stop, index + window)
  return start, stop


def document_stop(start):
  """Where each token's document ends (exclusive), from where it starts."""
  size = start.shape[0]
  index = jnp.arange(size, dtype=jnp.int32)
  first = jnp.where(start == index, index, size)
  following = jnp.concatenate([first[1:], jnp.full(1, size, jnp.int32)])
  return jax.lax.cummin(following, reverse=True)


def key_range(start, block_q, block_kv):
  """First and last key block that each query block needs, int32 (blocks,)."""
  start = start.reshape(-1, block_q)
  end = (jnp.arange(start.shape[0], dtype=jnp.int32) + 1) * block_q
  return start.min(1) // block_kv, (end - 1) // block_kv


def query_range(stop, block_q, block_kv):
  """First and last query block that needs each key block, int32 (blocks,)."""
  stop = stop.reshape(-1, block_kv)
  begin = jnp.arange(stop.shape[0], dtype=jnp.int32) * block_kv
  return begin // block_q, (stop.max(1) - 1) // block_q


def key_blocks(start, degree, tokens, *, block_q, block_kv, window=None):
  """Number of key blocks that a device visits for one head it holds.

  Args:
    start: int32 (N * T,), as group_attention takes it.
    degree: devices in the group; may be traced.
    tokens: T, tokens a device.
    block_q: query block length; divides T.
    block_kv: key block length; divides T.
    window: as group_attention takes it.
  """
  start, _ = visible(start, start, window)
  first, last = key_range(start, block_q, block_kv)
  used = jnp.arange(first.shape[0]) < degree * (tokens // block_q)
  return jnp.where(used, last - first + 1, 0).sum()


def segments(first, last, used, capacity):
  """Cuts the blocks' ranges first..last into segments of one common length.

  A kernel's grid over (segments, length) then does no more than the ranges
  ask for. The length is 1, hence no step is idle, unless that takes more than
  `capacity` segments; then it is the shortest power of two that fits.

  Args:
    first: int32 (blocks,), start of each block's range.
    last: int32 (blocks,), its end (inclusive).
    used: only the first `used` blocks have work; may be traced.
    capacity: static size of the list, at least `blocks`.

  Returns:
    (block, begin, count, length): int32 (capacity,) block of each segment and
    the start of its part of the range, the number of segments, their length.
  """
  blocks = first.shape[0]
  lengths = 2 ** jnp.arange(31, dtype=jnp.int32)
  steps = jnp.where(jnp.arange(blocks) < used, last - first + 1, 0)
  counts = -(-steps // lengths[:, None])
  choice = jnp.argmax(counts.sum(1) <= capacity)
  length, counts = lengths[choice], counts[choice]
  ends = jnp.cumsum(counts)
  index = jnp.arange(capacity, dtype=jnp.int32)
  block = (index[:, None] >= ends).sum(1, dtype=jnp.int32)
  block = jnp.minimum(block, blocks - 1)
  begin = first[block] + (index - (ends - counts)[block]) * length
  return block, begin, ends[-1], length
