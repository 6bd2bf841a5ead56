"""Work follows the documents; the kernels compile for TPUs that are absent."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax.pallas_kernels import packed_attention as lib
from adaptax.pallas_kernels.packed_attention import cases, schedule, tpu, xla

T = 64
PACKINGS = [
  (1, [64]),
  (1, [10, 40, 3]),
  (2, [100, 28]),
  (4, [5] * 51),
  (4, [200, 56]),
]


def pairs(start, stop, size, block_q, block_kv):
  """(query block, key block) pairs in which some query sees some key."""
  q = np.arange(size)
  seen = (q >= q[:, None]) & (q < stop[:, None])  # seen[key, query]
  keys, queries = np.nonzero(seen)
  return set(zip(queries // block_q, keys // block_kv))


@pytest.fixture
def count(monkeypatch):
  """Counts the blocks of scores that a program traced here really computes."""
  calls = []
  for module in (tpu, xla):
    scores = module._scores

    def counted(*args, scores=scores, **kwargs):
      jax.debug.callback(lambda: calls.append(1))
      return scores(*args, **kwargs)

    monkeypatch.setattr(module, "_scores", counted)

  def run(function, *args):
    jax.effects_barrier()
    calls.clear()
    results = jax.block_until_ready(function(*args))
    jax.effects_barrier()
    return results, len(calls)

  return run


def inputs(degree, lengths):
  """Operands of a device with 8 query and 4 KV heads, and the bounds."""
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.normal(size=(heads, T, 8)).astype(np.float32) for heads in (8, 4, 4)
  )
  start, stop = cases.pack(lengths, degree * T)
  pad = lambda x: np.append(x, np.zeros(4 * T - x.size)).astype(np.int32)
  bounds = schedule.visible(pad(start), pad(stop))
  return (*bounds, jnp.int32(degree), q, k, v), (start, stop)


BLOCKS = {"block_q": 16, "block_kv": 8}
KERNEL = {"scale": 1.0, "softcap": None, "interpret": True, **BLOCKS}


@jax.jit
def reference(start, stop, degree, q, k, v):
  """Output, and the gradients for the output gradient q."""
  attend = lambda q, k, v: lib.group_attention(
    q, k, v, start, stop, degree, scale=1.0, backend="reference"
  )
  out, pull = jax.vjp(attend, q, k, v)
  return out, pull(q)


def test_forward_kernel_runs_the_key_blocks_of_the_formula(count):
  run = jax.jit(functools.partial(tpu.forward, **KERNEL))
  for degree, lengths in PACKINGS:
    operands, bounds = inputs(degree, lengths)
    formula = lib.key_blocks(operands[0], degree, T, **BLOCKS)
    assert formula == len(pairs(*bounds, degree * T, 16, 8))
    local_heads = 4 // degree
    (out, _), calls = count(run, *operands)
    assert calls == local_heads * formula
    np.testing.assert_allclose(out, reference(*operands)[0], atol=1e-5)


def test_backward_kernels_run_each_pair_once_each(count, monkeypatch):
  # With room for few segments they are longer than a step, and some idle.
  monkeypatch.setattr(tpu, "CAPACITY", 1)
  forward = jax.jit(functools.partial(tpu.forward, **KERNEL))
  run = jax.jit(functools.partial(tpu.backward, **KERNEL))
  for degree, lengths in PACKINGS:
    operands, bounds = inputs(degree, lengths)
    q, kernels = operands[3], 2 * (4 // degree)
    grads, calls = count(run, *operands, *forward(*operands), q)
    assert calls == kernels * len(pairs(*bounds, degree * T, 16, 8))
    for actual, expected in zip(grads, reference(*operands)[1]):
      np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_loop_runs_the_key_blocks_of_the_formula(count):
  run = jax.jit(
    lambda start, stop, degree, q, k, v: lib.group_attention(
      q, k, v, start, stop, degree, scale=1.0, backend="xla", **BLOCKS
    )
  )
  for degree, lengths in PACKINGS:
    operands, _ = inputs(degree, lengths)
    formula = lib.key_blocks(operands[0], degree, T, **BLOCKS)
    assert count(run, *operands)[1] == formula


def test_window_shortens_the_work():
  start = np.zeros(256, np.int32)
  blocks = {"block_q": 16, "block_kv": 16}
  assert lib.key_blocks(start, 1, 256, **blocks) == 16 * 17 // 2
  assert lib.key_blocks(start, 1, 256, window=17, **blocks) == 16 + 15


@pytest.mark.parametrize("capacity", [8, 12, 40, 99])
@pytest.mark.parametrize("used", [0, 1, 5, 8])
def test_segments_cover_each_range_once(capacity, used):
  first = np.array([0, 0, 1, 3, 0, 5, 6, 0])
  last = np.array([0, 1, 2, 3, 4, 5, 6, 7])
  block, begin, count, length = map(
    np.asarray, schedule.segments(first, last, used, capacity)
  )
  assert count <= capacity
  visited = [
    (block[i], begin[i] + step)
    for i in range(count)
    for step in range(length)
    if begin[i] + step <= last[block[i]]
  ]
  ranges = [(i, j) for i in range(used) for j in range(first[i], last[i] + 1)]
  assert visited == ranges
  if len(ranges) <= capacity:
    assert count * length == len(ranges)


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_other_platforms_loop_over_blocks(platform):
  q, k = np.zeros((1, 4096, 8, 64)), np.zeros((1, 4096, 4, 64))
  start = np.zeros((1, 4096), np.int32)
  traced = jax.jit(lib.packed_attention).trace(q, k, k, start)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert "tpu_custom_call" not in text
  assert "4096x4096" not in text and "while" in text


CHIPS = {
  "v5e:2x2": ("qwen2.5_0.5b", 4096),
  "v5p:2x2x1": ("llama3_8b", 32768),
  "v6e:2x2": ("gemma2_9b", 8192),
}


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install libtpu",
)
@pytest.mark.parametrize("topology", CHIPS)
def test_kernels_compile_for_absent_tpus(topology, monkeypatch):
  from jax.experimental import topologies

  # No TPU is used, so other processes may hold libtpu's lock.
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  name, tokens = CHIPS[topology]
  case, devices = cases.CASES[name], 8
  chip = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices[0]
  spec = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(chip)
  )
  q, k = (
    spec((heads, tokens, case.dim), jnp.bfloat16)
    for heads in (case.heads, case.kv_heads)
  )
  bound = spec((devices * tokens,), jnp.int32)

  def step(q, k, v, start, stop, degree):
    attend = lambda q, k, v: lib.group_attention(
      q,
      k,
      v,
      start,
      stop,
      degree,
      scale=1.0,
      softcap=case.softcap,
      window=case.window,
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out)

  lowered = jax.jit(step).lower(q, k, k, bound, bound, spec((), jnp.int32))
  # The forward kernel and one each for the gradients of q and of k and v.
  assert lowered.as_text().count("tpu_custom_call") == 3
  memory = lowered.compile().memory_analysis()
  scores = case.heads * tokens**2 * 4
  assert memory.temp_size_in_bytes < scores / 8
