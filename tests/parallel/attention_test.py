import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptax.parallel.attention import make_attend, static_degree
from adaptax.parallel.layout import Layout, exchange_limit

N, T, DIM, HIDDEN, VOCAB = 8, 16, 8, 32, 32
MESH = jax.make_mesh(
  (N,), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
)

pytestmark = pytest.mark.slow
OPTIONS = {"softcap": None, "window": None}


def _params(heads, kv_heads, layers=2):
  shapes = {
    "q": (layers, HIDDEN, heads * DIM),
    "k": (layers, HIDDEN, kv_heads * DIM),
    "v": (layers, HIDDEN, kv_heads * DIM),
    "o": (layers, heads * DIM, HIDDEN),
    "embed": (VOCAB, HIDDEN),
  }
  rng = np.random.default_rng(0)
  draw = lambda s: rng.normal(size=s).astype(np.float32) / np.sqrt(s[-2])
  return {name: draw(shape) for name, shape in shapes.items()}


def _rope(x, positions):
  angle = positions[..., None, None] * 10.0 ** -jnp.arange(DIM // 2)
  a, b = jnp.split(x, 2, -1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _loss(params, batch, attend, options, gather=lambda x: x):
  """A two-layer attention-only language model's mean loss."""
  embed = gather(params["embed"])
  x = embed[batch["tokens"]]

  def block(x, w):
    w = jax.tree.map(gather, w)
    split = lambda y: y.reshape(*y.shape[:2], -1, DIM)
    q, k, v = (split(x @ w[name]) for name in "qkv")
    q, k = (_rope(y, batch["positions"]) for y in (q, k))
    out = attend(q, k, v, scale=DIM**-0.5, **options)
    return x + out.reshape(*x.shape[:2], -1) @ w["o"], None

  x, _ = jax.lax.scan(block, x, {name: params[name] for name in "qkvo"})
  logs = jax.nn.log_softmax(x @ embed.T)
  loss = -jnp.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
  return (loss * batch["weights"]).sum() / batch["weights"].sum()


def _dense(document, q, k, v, *, scale, softcap, window):
  """Attention of one row of documents with the whole mask written out."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
  scores = jnp.einsum("rqhd,rkhd->rhqk", q, k) * scale
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  gap = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
  mask = (gap >= 0) & (document[:, :, None] == document[:, None])
  if window:
    mask &= gap < window
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
  return jnp.einsum("rhqk,rkhd->rqhd", weights, v)


@functools.partial(jax.jit, static_argnums=2)
def _dense_loss_and_grad(params, batch, options):
  attend = functools.partial(_dense, batch["document"])
  loss = lambda p: _loss(p, batch, attend, dict(options))
  return jax.value_and_grad(loss)(params)


def _truth(params, documents, options):
  """Float64 loss and gradients on one device; knows nothing of layouts."""
  length = [len(x) for x in documents]
  pad = N * T - sum(length)
  row = lambda parts, fill: np.concatenate([*parts, np.full(pad, fill)])[None]
  batch = {
    "tokens": row(documents, 0).astype(int),
    "targets": row([np.append(x[1:], 0) for x in documents], 0).astype(int),
    "positions": row([np.arange(n) for n in length], 0),
    "weights": row([np.arange(n) < n - 1 for n in length], 0).astype(float),
    "document": row([np.full(n, i) for i, n in enumerate(length)], -1),
  }
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    out = _dense_loss_and_grad(params, batch, tuple(options.items()))
    return jax.device_get(out)


def _random_degree(rng, widest):
  degree = []
  while len(degree) < N:
    most = min(widest, N - len(degree))
    fits = [s for s in (1, 2, 4, 8) if s <= most and len(degree) % s == 0]
    size = int(rng.choice(fits))
    degree += [size] * size
  return degree


def _random_layout(rng, degree, **kwargs):
  """Gaps, empty groups, and one group that is full to the last token."""
  leaders = [d for d in range(N) if d % degree[d] == 0]
  full, empty = leaders[0], leaders[-1] if len(leaders) > 1 else None
  lengths, devices, offsets = [], [], []
  for device in leaders:
    room = degree[device] * T
    inner = rng.choice(np.arange(1, room), rng.integers(1, 5), replace=False)
    cuts = [0, *sorted(inner.tolist()), room]
    for begin, end in itertools.pairwise(cuts):
      if device == full or (device != empty and rng.random() < 0.8):
        lengths.append(end - begin)
        devices.append(device)
        offsets.append(begin)
  return Layout(
    T, degree, range(len(lengths)), lengths, devices, offsets, **kwargs
  )


def _parallel_loss_and_grad(options, **kwargs):
  """The jitted function, which must compile once for all layouts."""

  @functools.partial(jax.jit, static_argnames="static")
  def run(params, batch, static=None):
    attend = make_attend(
      *(MESH, "device", static or batch["degree"]),
      *(batch["start"], batch["stop"]),
      **kwargs,
    )
    gather = lambda w: jax.lax.with_sharding_constraint(
      w, NamedSharding(MESH, P())
    )
    loss = lambda p: _loss(p, batch, attend, options, gather)
    return jax.value_and_grad(loss)(params)

  return run


def _place(params, arrays):
  """Parameters sharded over all devices, whatever the layout; rows too."""
  spec = lambda x: P(*(None,) * (x.ndim - 1), "device")
  params = {
    name: jax.device_put(x, NamedSharding(MESH, spec(x)))
    for name, x in params.items()
  }
  return params, jax.device_put(arrays, NamedSharding(MESH, P("device")))


def _check(run, params, layout, options, static=None):
  rng = np.random.default_rng(sum(layout.lengths))
  documents = [rng.integers(0, VOCAB, n) for n in layout.lengths]
  sharded = _place(params, layout.arrays(documents))
  loss, grads = jax.device_get(run(*sharded, static=static))
  true_loss, true_grads = _truth(params, documents, options)
  np.testing.assert_allclose(loss, true_loss, rtol=1e-5)
  for name, grad in grads.items():
    scale = np.abs(true_grads[name]).max()
    np.testing.assert_allclose(
      grad / scale, true_grads[name] / scale, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize(
  "heads,kv_heads,layouts,options",
  [
    (8, 2, 20, OPTIONS),
    (8, 8, 4, {"softcap": 2.0, "window": 11}),
    (12, 3, 4, OPTIONS),
  ],
)
def test_one_program_serves_every_layout(heads, kv_heads, layouts, options):
  rng, seen = np.random.default_rng(heads + kv_heads), set()
  params, run = _params(heads, kv_heads), _parallel_loss_and_grad(options)
  for _ in range(layouts):
    degree = _random_degree(rng, exchange_limit(heads))
    layout = _random_layout(rng, degree, heads=heads)
    seen |= set(degree)
    _check(run, params, layout, options)
  assert run._cache_size() == 1
  assert layouts < 20 or seen == {1, 2, 4, 8}


@pytest.mark.parametrize(
  "heads,kv_heads,options",
  [(2, 1, OPTIONS), (9, 3, {"softcap": 2.0, "window": 11})],
)
def test_ring_serves_every_layout_with_one_program(heads, kv_heads, options):
  rng, params = np.random.default_rng(heads), _params(heads, kv_heads)
  run = _parallel_loss_and_grad(options, ring=True)
  for degree in (
    (8,) * 8,
    (4, 4, 4, 4, 2, 2, 1, 1),
    (1, 1, 2, 2, 4, 4, 4, 4),
    (1,) * 8,
  ):
    layout = _random_layout(rng, degree, heads=heads, ring=True)
    _check(run, params, layout, options)
  assert run._cache_size() == 1


def test_uniform_executor_compiles_once_a_degree():
  """Degree 8 is a ring here, with 4 heads."""
  rng, params = np.random.default_rng(0), _params(4, 2)
  run = _parallel_loss_and_grad(OPTIONS, ring=True)
  for degree in (1, 4, 8, 4, 1):
    layout = _random_layout(rng, [degree] * N, heads=4, ring=True)
    _check(run, params, layout, OPTIONS, static_degree(layout, "uniform"))
  assert run._cache_size() == 3


def test_executors():
  mixed = Layout(T, (2, 2, 1, 1), (), (), (), ())
  assert static_degree(mixed, "mixed") is None
  with pytest.raises(
    ValueError, match=r"one degree .* \[1, 2\]; use the mixed"
  ):
    static_degree(mixed, "uniform")
  with pytest.raises(ValueError, match="'unifrom': did you mean uniform"):
    static_degree(mixed, "unifrom")


def _attend_once(degree, heads, rows=N, tokens=T, **kwargs):
  bounds = jnp.broadcast_to(jnp.arange(tokens), (rows, tokens))
  q = jnp.ones((N, T, heads, DIM))
  attend = make_attend(MESH, "device", degree, bounds, bounds + 1, **kwargs)
  return attend(q, q, q, scale=1.0)


@pytest.mark.parametrize(
  "message,arguments",
  [
    ("layout of 4 devices does not fit the 8", dict(degree=1, rows=4)),
    ("degree 8 is above 4, .* 12 heads", dict(degree=8, heads=12)),
    ("one row a device, \\(8, 14,", dict(degree=1, tokens=14)),
    ("even number of tokens, got 15", dict(degree=1, tokens=15, ring=True)),
  ],
)
def test_bad_input(message, arguments):
  with pytest.raises(ValueError, match=message):
    _attend_once(**({"heads": 8} | arguments))


def test_a_degree_that_heads_forbid_is_not_silently_wrong():
  degree = jnp.array((2, 2, 1, 1, 4, 4, 4, 4))
  run = jax.jit(lambda d: _attend_once(d, heads=2))
  out = np.asarray(run(degree))
  np.testing.assert_array_equal(np.isnan(out).any((1, 2, 3)), degree > 2)


def test_one_device_exchanges_nothing():
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("device",))
  q = jnp.ones((1, T, 2, DIM))
  bounds = jnp.arange(T)[None]

  def run(q):
    degree = jnp.ones(1, jnp.int32)
    attend = make_attend(mesh, "device", degree, bounds, bounds + 1)
    return attend(q, q, q, scale=1.0)

  text = jax.jit(run).lower(q).as_text()
  assert "all_gather" not in text and "all_to_all" not in text
