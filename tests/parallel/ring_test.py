import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adaptax.parallel import ring as lib
from adaptax.parallel.layout import Layout

N, T, DIM = 8, 16, 8
MESH = jax.make_mesh(
  (N,), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
)

pytestmark = pytest.mark.slow
ROW = P("device")


def _spread(function, inputs):
  return jax.shard_map(
    function,
    mesh=MESH,
    in_specs=(ROW,) * inputs,
    out_specs=ROW,
    check_vma=False,
  )


def _attention(heads, q, k, v, start, degree, **kwargs):
  """Ring attention with subgroups of `heads` devices on (N, heads, T, D)."""

  def local(q, k, v, start, degree):
    steps = jax.lax.pmax(degree[0], "device") // heads
    start = jax.lax.all_gather(start[0], "device", tiled=True)
    start = jnp.roll(
      start, -(jax.lax.axis_index("device") // degree[0]) * degree[0] * T
    )
    out = lib.ring_attention(
      *(q[0], k[0], v[0], start, degree[0], steps),
      **dict(axis="device", width=heads, scale=DIM**-0.5, **kwargs),
    )
    return out[None]

  return _spread(local, 5)(q, k, v, start, degree)


@pytest.mark.parametrize("width", [1, 2])
def test_every_pair_once_and_the_same_work_everywhere(width):
  """Counts executed blocks and visible pairs of one causal document."""
  layout = Layout.place(T, [N] * N, [N * T], [0], heads=width, ring=True)
  options = lib._Options("device", width, 4, 1.0, None, None, None)

  def pair(mask, i, kv, stay, travel):
    blocks, pairs = stay
    seen = mask.sum(-1, keepdims=True, dtype=jnp.int32)
    return (blocks + 1, pairs + seen), travel

  def local(degree):
    size = width * T
    stay = (jnp.zeros((size, 1), jnp.int32),) * 2
    lower, kv = jnp.zeros(size, jnp.int32), jnp.zeros((2, 1, size, 1))
    stay, _ = lib._turn(
      options, lower, degree[0], N // width, pair, kv, stay, ()
    )
    return jnp.concatenate(stay, 1)[None]

  count = np.asarray(jax.jit(_spread(local, 1))(np.full(N, N, np.int32)))
  blocks, pairs = count[..., 0], count[..., 1]
  member = np.arange(N) // width * width
  index = layout.index().reshape(N // width, -1)[member // width]
  np.testing.assert_array_equal(pairs, index + 1)
  # A block of queries at its i-th place in the buffer needs i + 1 key blocks.
  np.testing.assert_array_equal(blocks, index // 4 + 1)
  assert len(set(blocks.sum(1))) == 1


def test_groups_without_a_ring_get_zeros():
  degree = np.array([4] * 4 + [2] * 2 + [1] * 2, np.int32)
  x, start = jnp.ones((N, 2, T, DIM)), np.zeros((N, T), np.int32)
  out = jax.jit(functools.partial(_attention, 2))(x, x, x, start, degree)
  np.testing.assert_allclose(out[:4], 1, rtol=1e-6)
  np.testing.assert_array_equal(out[4:], 0)


def test_bfloat16_accumulates_in_float32():
  rng = np.random.default_rng(0)
  layout = Layout.place(T, [N] * N, [70, 40], [0, 0], heads=2, ring=True)
  start, degree = layout.bounds()[0], np.full(N, N, np.int32)
  qkv = rng.normal(size=(3, N, 2, T, DIM)).astype(jnp.bfloat16)
  g = rng.normal(size=(N, 2, T, DIM)).astype(jnp.bfloat16)

  @jax.jit
  def run(g, *qkv):
    call = lambda *qkv: _attention(2, *qkv, start, degree, block=4)
    out, vjp = jax.vjp(call, *qkv)
    return out, *vjp(g)

  low = run(g, *qkv)
  exact = run(*(x.astype(np.float32) for x in (g, *qkv)))
  for a, b in zip(low, exact):
    assert a.dtype == jnp.bfloat16
    error = np.abs(np.asarray(a, np.float32) - b).max()
    assert error < 2**-7 * np.abs(b).max()


def test_backward_does_not_repeat_forward():
  """Counted in loops: rematerialisation that saves the output adds none."""
  x, start = jnp.ones((N, 2, T, DIM)), np.zeros((N, T), np.int32)
  degree = np.full(N, N, np.int32)
  policies = jax.checkpoint_policies

  def loops(wrap):
    layer = wrap(lambda x: _attention(2, jnp.sin(x), x, x, start, degree))
    grad = jax.jit(jax.value_and_grad(lambda x: layer(x).sum()))
    return grad.lower(x).as_text().count("stablehlo.while")

  plain = loops(lambda f: f)
  named = policies.save_only_these_names("attention_out", "attention_lse")
  assert loops(functools.partial(jax.checkpoint, policy=named)) == plain
  assert loops(jax.checkpoint) > plain
