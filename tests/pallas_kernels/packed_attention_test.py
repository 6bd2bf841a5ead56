"""Every backend against a float64 NumPy oracle that works document by document."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax.pallas_kernels import packed_attention as lib
from adaptax.pallas_kernels.packed_attention import cases, schedule, tpu

H, HK, D, T, N = 16, 8, 16, 32, 8


def oracle(q, k, v, g, lengths, scale, softcap=None, window=None):
  """Output and gradients of q, k, v; whole sequences (H, S, D), float64."""
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  groups = q.shape[0] // k.shape[0]
  bounds = np.cumsum([0, *lengths, *[1] * (q.shape[1] - sum(lengths))])
  for h in range(q.shape[0]):
    for a, b in itertools.pairwise(bounds):
      qi, ki, vi = q[h, a:b], k[h // groups, a:b], v[h // groups, a:b]
      raw = qi @ ki.T * scale
      s = raw if softcap is None else softcap * np.tanh(raw / softcap)
      age = np.subtract.outer(np.arange(b - a), np.arange(b - a))
      seen = (age >= 0) & (age < (window or b - a))
      p = np.exp(s - s.max(1, keepdims=True)) * seen
      p /= p.sum(1, keepdims=True)
      out[h, a:b] = p @ vi
      dp = g[h, a:b] @ vi.T
      ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
      if softcap is not None:
        ds *= 1 - np.tanh(raw / softcap) ** 2
      dq[h, a:b] = ds @ ki
      dk[h // groups, a:b] += ds.T @ qi
      dv[h // groups, a:b] += p.T @ g[h, a:b]
  return out, dq, dk, dv


def exchanged(x, degree):
  """Whole sequences (H / degree, degree * T, D) as the exchange leaves them."""
  heads, _, dim = x.shape
  return np.concatenate(
    [x[:, s * T : (s + 1) * T] for s in range(degree)]
  ).reshape(heads * degree, T, dim)


def assert_close(actual, expected, tolerance):
  for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected):
    a = np.asarray(a, np.float64)
    # Where the exact gradient is zero, noise is on the scale of the inputs.
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1)
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def normal(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def with_gradients(attend):
  """attend(q, k, v) and its pull-back of g."""

  def run(q, k, v, g):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g)

  return run


@functools.cache
def group_program(backend):
  """One jitted program for all layouts, in 16 x 8 blocks, and its traces."""
  traces = []

  def run(q, k, v, g, start, stop, degree, window):
    traces.append(backend)
    options = {"scale": D**-0.5, "softcap": None}
    if backend == "tpu":
      # The public function holds to block sizes that hardware takes.
      options |= {"block_q": 16, "block_kv": 8, "interpret": True}
      start, stop = schedule.visible(start, stop, window)
      head = (start, stop, degree, q, k, v)
      out, lse = tpu.forward(*head, **options)
      return out, *tpu.backward(*head, out, lse, g, **options)
    if backend == "xla":
      options |= {"block_q": 16, "block_kv": 8}
    attend = lambda q, k, v: lib.group_attention(
      q,
      k,
      v,
      start,
      stop,
      degree,
      window=window,
      backend=backend,
      **options,
    )
    return with_gradients(attend)(q, k, v, g)

  return jax.jit(run), traces


@st.composite
def layouts(draw):
  degree = draw(st.sampled_from([1, 2, 4, 8]))
  left, lengths = degree * T, []
  for length in draw(st.lists(st.integers(1, degree * T), max_size=12)):
    lengths.append(min(length, left))
    left -= lengths[-1]
    if not left:
      break
  return degree, lengths, draw(st.sampled_from([1, 3, 24, 10**9]))


FULL = (8, [8 * T], 10**9)
EMPTY = (4, [], 10**9)


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(layout=layouts(), seed=st.integers(0, 99))
@hypothesis.example(layout=FULL, seed=0)
@hypothesis.example(layout=EMPTY, seed=0)
@hypothesis.example(layout=(8, [7, 100, 149], 10**9), seed=0)
def test_one_program_equals_the_oracle_for_every_layout(backend, layout, seed):
  degree, lengths, window = layout
  size, rng = degree * T, np.random.default_rng(seed)
  whole = normal(
    seed, *[(heads // degree, size, D) for heads in (H, HK, HK, H)]
  )
  start, stop = cases.pack(lengths, size)
  # What lies beyond the group's buffer belongs to nobody: make it noise.
  noise = rng.integers(0, N * T, (2, N * T - size))
  start, stop = np.append(start, noise[0]), np.append(stop, noise[1])
  program, traces = group_program(backend)
  results = program(
    *[exchanged(x, degree) for x in whole],
    *(x.astype(np.int32) for x in (start, stop)),
    np.int32(degree),
    np.int32(window),
  )
  expected = oracle(*whole, lengths, D**-0.5, window=window)
  assert_close(results, [exchanged(x, degree) for x in expected], 2e-5)
  assert len(traces) == 1


PACKINGS = [256], [40, 160, 3]


@pytest.mark.parametrize(
  "backend,heads,kv_heads",
  [("reference", 4, 1), ("xla", 4, 1), ("tpu", 2, 2), ("auto", 9, 3)],
)
def test_packed_rows_equal_the_oracle(backend, heads, kv_heads):
  shape, kv_shape = ((len(PACKINGS), 256, h, 64) for h in (heads, kv_heads))
  q, k, v, g = normal(1, shape, kv_shape, kv_shape, shape)
  start = np.stack([cases.pack(lengths, 256)[0] for lengths in PACKINGS])
  attend = lambda q, k, v: lib.packed_attention(
    q, k, v, start, softcap=5.0, window=50, backend=backend
  )
  results = jax.jit(with_gradients(attend))(q, k, v, g)
  for row, lengths in enumerate(PACKINGS):
    whole = [x[row].swapaxes(0, 1) for x in (q, k, v, g)]
    expected = oracle(*whole, lengths, 64**-0.5, 5.0, 50)
    actual = [np.swapaxes(x[row], 0, 1) for x in results]
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu"])
def test_bfloat16_stays_within_its_rounding(backend):
  q, k, v, g = (
    x.astype(jnp.bfloat16)
    for x in normal(2, *[(1, 256, heads, 64) for heads in (2, 1, 1, 2)])
  )
  start = cases.pack([200, 40], 256)[0][None]
  attend = lambda q, k, v: lib.packed_attention(q, k, v, start, backend=backend)
  results = jax.jit(with_gradients(attend))(q, k, v, g)
  assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
  whole = [np.swapaxes(x[0], 0, 1) for x in (q, k, v, g)]
  expected = oracle(*whole, [200, 40], 64**-0.5)
  assert_close([np.swapaxes(x[0], 0, 1) for x in results], expected, 1e-2)


def test_lengths_that_no_block_divides():
  q, k, v, g = normal(3, *[(2, 150, heads, 24) for heads in (2, 2, 2, 2)])
  start = np.stack([cases.pack(x, 150)[0] for x in ([150], [70, 71])])
  attend = lambda q, k, v: lib.packed_attention(q, k, v, start)
  results = jax.jit(with_gradients(attend))(q, k, v, g)
  for row, lengths in enumerate(([150], [70, 71])):
    whole = [x[row].swapaxes(0, 1) for x in (q, k, v, g)]
    actual = [np.swapaxes(x[row], 0, 1) for x in results]
    assert_close(actual, oracle(*whole, lengths, 24**-0.5), 2e-5)


def test_remat_policy_keeps_the_forward_from_being_repeated():
  q, k, v = normal(4, *[(1, 256, heads, 64) for heads in (2, 1, 1)])
  start = np.zeros((1, 256), np.int32)
  names = "attention_out", "attention_lse"
  policy = jax.checkpoint_policies.save_only_these_names(*names)

  def loss(q, k, v, policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def layer(q, _):
      return lib.packed_attention(jnp.sin(q), k, v, start), None

    return jax.lax.scan(layer, q, length=2)[0].sum()

  def products(policy):
    grads = jax.grad(functools.partial(loss, policy=policy), (0, 1, 2))
    text = jax.jit(grads).lower(q, k, v).as_text()
    return text.count("stablehlo.dot_general")

  # Two products forward and five backward; repeating adds two.
  assert (products(policy), products(None)) == (7, 9)


@pytest.mark.parametrize(
  "change,message",
  [
    ({"backend": "xls"}, "unknown backend 'xls': did you mean xla"),
    ({"window": 0}, "window must be at least 1 token, got 0"),
    ({"backend": "tpu"}, "head size must be one of .* got 16"),
    ({"heads": 3}, "multiple of KV heads, got 3 and 2"),
    ({"start": (1, 99)}, r"start must be \(1, 128\), got \(1, 99\)"),
    ({"k": (1, 64, 2, 16)}, "k and v must be .* to fit q"),
    ({"v": (1, 128, 1, 16)}, r"got \(1, 128, 2, 16\) and \(1, 128, 1, 16\)"),
    ({"q": (128, 4, 16)}, r"q must have axes \(rows, T, H, D\)"),
  ],
)
def test_bad_input_fails_in_one_line(change, message):
  shapes = {"k": (1, 128, 2, 16), "v": (1, 128, 2, 16), "start": (1, 128)}
  shapes["q"] = (1, 128, change.pop("heads", 4), 16)
  shapes |= {name: change.pop(name) for name in list(change) if name in shapes}
  q, k, v = (np.zeros(shapes[name], np.float32) for name in "qkv")
  with pytest.raises(ValueError, match=message) as error:
    lib.packed_attention(q, k, v, np.zeros(shapes["start"], np.int32), **change)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "degree,size,message",
  [
    (3, 256, r"degree 3 must be one of \[1, 2\]"),
    (4, 512, r"degree 4 must be one of \[1, 2\]: powers of two that divide"),
    (1, 200, r"start and stop must be \(N \* 128,\)"),
  ],
)
def test_bad_group_fails_in_one_line(degree, size, message):
  q, k = np.zeros((4, 128, 64), np.float32), np.zeros((2, 128, 64), np.float32)
  bound = np.zeros(size, np.int32)
  with pytest.raises(ValueError, match=message):
    lib.group_attention(q, k, k, bound, bound, degree, scale=1.0)


def test_kernel_blocks_must_suit_the_hardware():
  q, bound = np.zeros((2, 384, 64), np.float32), np.zeros(384, np.int32)
  with pytest.raises(ValueError, match="block_q must be a multiple of 128"):
    lib.group_attention(
      q, q, q, bound, bound, 1, scale=1.0, backend="tpu", block_q=256
    )
