"""Programs for absent hardware: what is counted, refused, compiled."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptax.parallel import AXIS, aot, flat_mesh, hlo
from adaptax.parallel.flops import product_flops
from adaptax.parallel.hardware import CHIPS, GIB
from adaptax.parallel.hlo import Total

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install libtpu",
)
needs_cuda = pytest.mark.skipif(
  importlib.util.find_spec("jax_plugins") is None
  or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
  reason="no CUDA plugin: pip install --no-deps jax-cuda12-plugin"
  " jax-cuda12-pjrt, of jax's version",
)


def repeat(body, times):
  return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, times)[0]


def test_collectives_in_nested_loops_count_as_often_as_they_run():
  ring = [(i, (i + 1) % 8) for i in range(8)]

  def gather(x):
    whole = jax.lax.all_gather(x, AXIS, tiled=True)
    return x + whole[:16] * whole[16:32]

  def outer(x):
    x = jnp.sin(repeat(gather, 3)(x))
    x = jax.lax.ppermute(jax.lax.psum(x, AXIS), AXIS, ring)
    return jax.lax.all_to_all(jnp.sin(x), AXIS, 0, 0, tiled=True)

  spread = jax.shard_map(
    repeat(outer, 5),
    mesh=flat_mesh(),
    in_specs=P(AXIS),
    out_specs=P(AXIS),
    check_vma=False,
  )
  text = jax.jit(spread).lower(jnp.ones(128)).compile().as_text()
  local = 16 * 4
  assert hlo.Module(text).collectives() == {
    "all-gather": Total(15, 15 * 8 * local),
    "all-reduce": Total(5, 5 * local),
    "collective-permute": Total(5, 5 * local),
    "all-to-all": Total(5, 5 * local),
  }


# As libtpu writes it: no trip count, bounds behind copies, a reduce-scatter as
# a fusion, and collectives that start and are done.
TPU_TEXT = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,128}
}

%body (state: (s32[], bf16[5,16,128])) -> (s32[], bf16[5,16,128]) {
  %state = (s32[]{:T(128)}, bf16[5,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = bf16[5,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %part = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice
  %gather = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%part), dimensions={0}
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%gather)
  %mine = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[5,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%next, %stack)
}

%slice (x: bf16[5,16,128], i: s32[]) -> bf16[16,128] {
  %x = bf16[5,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  ROOT %piece = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%x, %i.1, %i.1, %i.1), dynamic_slice_sizes={1,16,128}
}

%condition (state.1: (s32[], bf16[5,16,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[5,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (arg: bf16[5,16,128]) -> (s32[], bf16[5,16,128]) {
  %arg = bf16[5,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%two)
  %first = (s32[]{:T(128)}, bf16[5,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%start, %arg)
  ROOT %loop = (s32[]{:T(128)}, bf16[5,16,128]{2,1,0:T(8,128)(2,1)}) while(%first), condition=%condition, body=%body
}
"""


def test_tpu_text_is_read_without_trip_counts():
  module = hlo.Module(TPU_TEXT)
  whole = 64 * 128 * 2
  assert module.entry == "main"
  assert module.collectives() == {
    "all-gather": Total(5, 5 * whole),
    "reduce-scatter": Total(5, 5 * whole),
  }


def test_a_loop_whose_bound_is_data_counts_once():
  text = TPU_TEXT.replace("constant(7)", "get-tuple-element(%state.1), index=2")
  assert hlo.Module(text).collectives()["all-gather"].executions == 1


def test_traffic_takes_a_slice_of_what_a_loop_walks_over():
  part, whole, scalar = 16 * 128 * 2, 64 * 128 * 2, 4
  # The slice reads its part of the stack and an index; it lands in VMEM.
  slicing = part + scalar
  gathering = part + whole
  scattering = whole + part
  stepping = 3 * scalar
  each = slicing + gathering + scattering + stepping
  assert hlo.Module(TPU_TEXT).traffic() == 5 * each + 2 * scalar


def flops_of(function, *args, platform="tpu"):
  return product_flops(jax.jit(function).trace(*args).jaxpr, platform)


SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8**3


def test_products_count_by_shape():
  a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
  product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
  assert flops_of(product, a, b) == (2 * 3 * 4 * 5 * 7, False)


def test_loops_gradients_and_remat_multiply():
  step = jax.checkpoint(lambda x: jnp.sin(x @ x))
  loss = lambda x: repeat(step, 6)(x).sum()
  assert flops_of(loss, SQUARE) == (6 * ONE, False)
  # Forward, forward again, and two products backward.
  assert flops_of(jax.grad(loss), SQUARE) == (6 * 4 * ONE, False)


def test_the_dearest_branch_counts_or_that_of_the_platform():
  branches = lambda x: x, lambda x: x @ x, lambda x: x @ x @ x
  switch = lambda i, x: jax.lax.switch(i, branches, x)
  assert flops_of(switch, jnp.int32(0), SQUARE) == (2 * ONE, False)
  by_name = dict(zip(("cpu", "cuda", "default"), branches))
  choose = lambda x: jax.lax.platform_dependent(x, **by_name)
  counts = [
    flops_of(choose, SQUARE, platform=name)[0] / ONE
    for name in ("cpu", "cuda", "tpu")
  ]
  assert counts == [0, 1, 2]


def test_the_parts_of_all_devices_add_up():
  spread = jax.shard_map(
    lambda x: x @ x.T, mesh=flat_mesh(), in_specs=P(AXIS), out_specs=P(AXIS)
  )
  local = 2 * 1 * 1 * 8
  assert flops_of(spread, jnp.ones((8, 8))) == (8 * local, False)


def test_what_cannot_be_counted_is_said():
  loop = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)
  assert flops_of(loop, jnp.int32(3), SQUARE) == (0, True)
  idle = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x + 1, x)
  assert flops_of(idle, jnp.int32(3), SQUARE) == (0, False)

  def kernel(x, out):
    out[...] = x[...] @ x[...]

  call = functools.partial(pl.pallas_call, kernel, SQUARE, interpret=True)
  assert flops_of(lambda x: call()(x), SQUARE) == (0, True)
  cost = pl.CostEstimate(flops=ONE, transcendentals=0, bytes_accessed=0)
  known = lambda x: call(cost_estimate=cost)(x)
  assert flops_of(known, SQUARE) == (ONE, False)


@pytest.mark.parametrize(
  "chip, ratio",
  [("v4", 224), ("v5e", 240), ("v5p", 166), ("v6e", 560), ("tpu7x", 312)]
  + [("a100", 153), ("h100", 295), ("h200", 206), ("b200", 293)],
)
def test_the_table_has_the_critical_ratios(chip, ratio):
  facts = CHIPS[chip]
  assert facts.flops / facts.bandwidth == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
  "chip, kind, shape, seconds",
  [
    ("v5e", "all-gather", (1, 16), 1e9 / 9e10 * 15 / 16),
    ("v5e", "all-gather", (1, 8), 1e9 / 4.5e10 * 7 / 8),
    ("v5e", "all-reduce", (16, 16), 2 * 1e9 / 18e10 * 255 / 256),
    ("v5p", "reduce-scatter", (4, 4, 4), 1e9 / 54e10 * 63 / 64),
    # A quarter of an all-gather of what all devices of a ring hold together.
    ("v5e", "all-to-all", (1, 16), 16 * 1e9 / 9e10 / 4),
    ("v5p", "ragged-all-to-all", (2, 2, 1), 2 * 1e9 / 4 / 9e10),
    ("v5p", "collective-permute", (4, 4, 4), 1e9 / 9e10),
    ("h100", "all-gather", (8,), 1e9 / 4.5e11 * 7 / 8),
    ("h100", "ragged-all-to-all", (16,), 1e9 / 5e10 * 15 / 16),
    ("v5p", "all-reduce", (1, 1, 1), 0),
  ],
)
def test_collective_times_are_those_of_the_links(chip, kind, shape, seconds):
  assert CHIPS[chip].seconds(kind, 1e9, shape) == pytest.approx(seconds)


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5p:4x4x5", "unknown topology 'v5p:4x4x5': did you mean v5p:4x4x"),
    ("v5e:3x3", "allowed: v5e:1x1, v5e:2x2, v5e:2x4"),
    ("h100:3", "unknown topology 'h100:3'.* h100:8, h100:16"),
    ("v5p", "unknown topology 'v5p'.*v5p:2x2x1, v5p:2x2x2"),
    ("v5litepod-16", "unknown chip 'v5litepod-16'.*v4, v5e, v5p, v6e"),
    ("h10:8", "unknown chip 'h10': did you mean h100"),
  ],
)
def test_a_topology_that_does_not_exist_is_named_in_one_line(name, message):
  with pytest.raises(ValueError, match=message) as caught:
    aot.target(name)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, command",
  [
    ("v5p:4x4x4", r"libtpu is not installed: pip install libtpu$"),
    (
      "h100:8",
      r"pip install --no-deps jax-cuda12-plugin==\d.* jax-cuda12-pjrt",
    ),
  ],
)
def test_a_missing_compiler_is_answered_by_the_command(
  name, command, monkeypatch
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ModuleNotFoundError, match=command) as caught:
    aot.target(name)
  assert "\n" not in str(caught.value)


@pytest.fixture
def product():
  """Lays x @ w out on a target; `w` says along which axis w is cut."""

  def make(name, size, *w):
    where = aot.target(name)
    mesh = flat_mesh(where.devices)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = (
      shape((1024, size), sharding=NamedSharding(mesh, P(AXIS))),
      shape((size, size), sharding=NamedSharding(mesh, P(*w))),
    )
    return where, jax.jit(lambda x, w: jnp.sin(x @ w)), *args

  return make


TPUS = [name for name, chip in CHIPS.items() if chip.dimensions]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", TPUS)
def test_every_topology_of_the_table_exists(chip, capfd):
  for size in CHIPS[chip].sizes:
    where = aot.target(f"{chip}:{size}")
    assert where.devices[0].device_kind == where.chip.kind
    per_chip = len(where.devices) / jnp.prod(jnp.array(where.shape))
    assert per_chip == (2 if chip == "tpu7x" else 1)
  assert capfd.readouterr().err == ""


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", TPUS)
def test_usable_memory_is_what_the_compiler_grants(chip, product):
  where, function, x, w = product(f"{chip}:{CHIPS[chip].sizes[0]}", 1 << 18)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    function.lower(x, w).compile()
  granted = re.search(r"available HBM \(([\d.]+)G\)", str(caught.value))
  assert float(granted[1]) == pytest.approx(where.chip.hbm / GIB, abs=0.01)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_one_chip_fits_sixteen(product):
  size = 1 << 17
  large = aot.compile_for(*product("v5e:1x1", size))
  assert not large.fits and large.peak > 32 * GIB
  assert large.arguments == 2 * (1024 * size + size**2)
  assert large.largest[0][0] == 2 * size**2
  assert "DOES NOT FIT" in str(large) and "bf16[131072, 131072]" in str(large)
  cut = aot.compile_for(*product("v5e:4x4", size, None, AXIS))
  assert cut.fits and "16 x TPU v5 lite" in str(cut)
  assert cut.arguments == 2 * (1024 * size + size**2) // 16
  assert cut.flops == 2 * 1024 * size**2 / 16
  assert "ESTIMATE" in str(cut) and "largest" not in str(cut)


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("chip", ["a100", "h100", "h200", "b200"])
def test_gpus_are_compiled_for_by_description(chip, product, capfd):
  size = 8192
  where, *program = product(f"{chip}:8", size, AXIS)
  report = aot.compile_for(where, *program)
  assert where.devices[0].device_kind == where.chip.kind
  assert report.fits and report.arguments == 2 * (1024 * size + size**2) // 8
  assert report.collectives["all-gather"] == Total(1, 2 * size**2)
  assert capfd.readouterr().err == ""


@pytest.mark.slow
@needs_cuda
def test_what_does_not_fit_a_gpu_is_said(product):
  report = aot.compile_for(*product("h100:1", 1 << 18))
  assert not report.fits and "DOES NOT FIT" in str(report)
  assert report.largest[0][0] == 2 << 36
