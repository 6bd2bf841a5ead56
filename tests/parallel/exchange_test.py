import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adaptax.parallel import exchange as lib

MESH = jax.make_mesh(
  (8,), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
)
DEGREES = (
  (1,) * 8,
  (8,) * 8,
  (2, 2, 1, 1, 4, 4, 4, 4),
  (4, 4, 4, 4, 1, 1, 2, 2),
)
T, DIM = 3, 2


def _on_mesh(function):
  """`function(x, degree)` of one device as a function of (N * rows, ...)."""
  return jax.jit(
    jax.shard_map(
      lambda x, degree: function(x, degree[0]),
      mesh=MESH,
      in_specs=(P("device"), P("device")),
      out_specs=P("device"),
      check_vma=False,
    )
  )


def _random(rows, dtype=np.float32):
  x = np.random.default_rng(0).normal(size=(8 * rows, T, DIM))
  return x.astype(dtype)


def _swap(x, degree, rows):
  """Heads for sequence, in NumPy: x (8, heads, T, D) -> (8, rows, T, D).

  Heads are repeated until each device of the group has rows / degree.
  """
  out = np.zeros((8, rows, *x.shape[2:]), x.dtype)
  x = np.repeat(x, rows // x.shape[1], 1)
  for me in range(8):
    s = degree[me]
    base, share = me // s * s, rows // s
    for i in range(s):
      mine = x[base + i, (me - base) * share : (me - base + 1) * share]
      out[me, i * share : (i + 1) * share] = mine
  return out


def test_emulation_follows_the_documented_example():
  # The example of jax.lax.ragged_all_to_all's own docstring, without the
  # initial output: rows that nothing is written to are zero here.
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("device",))
  call = jax.shard_map(
    functools.partial(lib.ragged_all_to_all, axis="device"),
    mesh=mesh,
    in_specs=(P("device"),) * 5,
    out_specs=P("device"),
    check_vma=False,
  )
  tables = ([0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1])
  operand = jnp.array([1, 2, 2, 0, 3, 4, 0, 0])
  out = call(operand, *(jnp.array(t, jnp.int32) for t in tables))
  np.testing.assert_array_equal(out, [1, 3, 0, 0, 2, 2, 4, 0])


def test_exchange_swaps_and_inverts():
  x = _random(8)
  run = _on_mesh(lambda x, s: lib.exchange(x, s, 8 // s, axis="device"))
  for degree in DEGREES:
    degree = np.array(degree, np.int32)
    once = np.asarray(run(x, degree))
    expected = _swap(x.reshape(8, 8, T, DIM), degree, 8)
    np.testing.assert_array_equal(once, expected.reshape(x.shape))
    np.testing.assert_array_equal(run(once, degree), x)
  assert run._cache_size() == 1


@pytest.mark.parametrize("heads", [8, 2, 1, 3, 6])
def test_kv_heads_are_repeated_and_gradients_summed(heads):
  rows = int(np.lcm(heads, 8))
  x, g = _random(heads), _random(rows)
  run = _on_mesh(lambda x, s: lib.exchange_kv(x, s, rows, axis="device"))
  both = jax.jit(lambda x, s, g: (run(x, s), jax.vjp(run, x, s)[1](g)[0]))
  # The whole map as a matrix, one basis vector a head and device.
  basis = np.eye(8 * heads).reshape(8 * heads, 8, heads, 1, 1)
  for degree in DEGREES:
    degree = np.array(degree, np.int32)
    out, grad = both(x, degree, g)
    expected = _swap(x.reshape(8, heads, T, DIM), degree, rows)
    np.testing.assert_array_equal(out, expected.reshape(out.shape))
    matrix = np.array([_swap(b, degree, rows).ravel() for b in basis])
    expected = np.tensordot(matrix, g.astype(np.float64), 1)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)


def test_replica_gradients_sum_in_float32():
  # Summed one by one in bfloat16, 1 + 2^-8 + 2^-8 + ... stays 1.
  run = _on_mesh(lambda x, s: lib.exchange_kv(x, s, 32, axis="device"))
  g = np.full((8, 32, 1, 1), 2.0**-8)
  g[:, 0] = 1
  g = jnp.asarray(g.reshape(256, 1, 1), jnp.bfloat16)
  x, degree = jnp.zeros((8, 1, 1), jnp.bfloat16), np.ones(8, np.int32)
  grad = jax.jit(lambda x: jax.vjp(run, x, degree)[1](g)[0])(x)
  np.testing.assert_allclose(np.float32(grad), 1 + 31 / 256, atol=2.0**-8)


@pytest.mark.parametrize("heads", [8, 2, 6])
def test_volume(heads):
  """A device sends (s - 1) / s of the rows, of no more copies than needed."""

  def sent(_, s):
    sizes = lib._tables(s, lib._lcm(heads, s) // s, "device")[1]
    return sizes.sum()[None] - sizes[jax.lax.axis_index("device")]

  run = _on_mesh(sent)
  for degree in DEGREES:
    s = np.array(degree, np.int32)
    expected = np.lcm(heads, s) * (s - 1) // s
    np.testing.assert_array_equal(run(np.zeros(8), s), expected)


@pytest.mark.parametrize("degree", [1, 2, 8])
@pytest.mark.parametrize("heads", [8, 3])
def test_static_degree_equals_traced(degree, heads):
  rows, table = int(np.lcm(heads, degree)), np.full(8, degree, np.int32)
  x, g = _random(heads), _random(rows)

  def both(static):
    run = _on_mesh(
      lambda x, s: lib.exchange_kv(x, static or s, rows, axis="device")
    )
    return jax.jit(lambda x: (run(x, table), jax.vjp(run, x, table)[1](g)[0]))(
      x
    )

  for a, b in zip(both(degree), both(None)):
    np.testing.assert_array_equal(a, b)


def test_gather_group():
  x = np.arange(16, dtype=np.int32)
  run = _on_mesh(lambda x, s: lib.gather_group(x, s, 16, axis="device"))
  out = np.asarray(run(x, np.array(DEGREES[2], np.int32))).reshape(8, 16)
  np.testing.assert_array_equal(out[1, :4], [0, 1, 2, 3])
  np.testing.assert_array_equal(out[2, :2], [4, 5])
  np.testing.assert_array_equal(out[6, :8], np.arange(8, 16))


def test_lowers_to_the_collective_where_there_is_one():
  run = _on_mesh(lambda x, s: lib.exchange(x, s, 8 // s, axis="device"))
  grad = jax.jit(jax.grad(lambda x, s: (run(x, s) ** 2).sum()))
  traced = grad.trace(_random(8), np.array(DEGREES[2], np.int32))
  for platform in ("tpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") == 2
    assert "all_gather" not in text
