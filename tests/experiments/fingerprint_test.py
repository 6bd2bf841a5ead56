"""Hashes of arrays against their formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptax.experiments import fingerprint as hashing
from adaptax.experiments.fingerprint import fingerprint


def _expected(x):
  """The documented sum in NumPy: lowbias32 of bits and place."""
  bits = np.asarray(x).reshape(-1)
  if bits.dtype.kind not in "iub":
    bits = bits.view(f"u{bits.dtype.itemsize}")
  place = np.arange(bits.size, dtype=np.uint64) * 0x9E3779B9
  word = (bits.astype(np.int64).astype(np.uint64) + place) % 2**32
  word = (word ^ word >> np.uint64(16)) * 0x7FEB352D % 2**32
  word = (word ^ word >> np.uint64(15)) * 0x846CA68B % 2**32
  return int((word ^ word >> np.uint64(16)).sum() % 2**32)


@pytest.mark.parametrize(
  "dtype",
  ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"],
)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5, 3), (16, 24), (0, 4)])
def test_it_is_the_documented_sum(dtype, shape):
  x = jax.random.normal(jax.random.key(0), shape) * 100
  x = (x > 0) if dtype == "bool" else x.astype(dtype)
  assert fingerprint({"a": x}) == {"a": _expected(x)}


@pytest.mark.parametrize(
  "shape", [(3, 2**18 + 2), (2**18 + 3,), (5, 3, 100_000), (600_000, 2)]
)
def test_arrays_above_one_chunk(shape):
  x = jax.random.bits(jax.random.key(1), shape, jnp.uint8)
  assert fingerprint(x) == {"": _expected(x)}


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")])
def test_blocks_above_one_chunk(spec):
  x = jax.random.bits(jax.random.key(1), (8, 2**18 + 8), jnp.uint8)
  mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
  there = jax.device_put(x, NamedSharding(mesh, spec))
  assert fingerprint(there) == {"": _expected(x)}


@pytest.mark.parametrize(
  "spec",
  [
    P(), P("x"), P("y"), P(None, "x"), P("x", "y"), P("y", "x"),
    P(("x", "y")), P(None, None, ("y", "x")),
  ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_is_the_same_under_every_sharding(spec, kind):
  x = jax.random.normal(jax.random.key(2), (16, 8, 8))
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
  there = jax.device_put(x, NamedSharding(mesh, spec))
  assert fingerprint({"a": there}) == {"a": _expected(x)}


def test_leaves_may_be_on_different_devices():
  ones = np.ones(3, np.float32)
  first, second = (jax.device_put(ones, d) for d in jax.devices()[:2])
  found = fingerprint({"z": first, "a": [second, jnp.zeros(3)]})
  assert found["z"] == found["a/0"] != found["a/1"]
  assert list(found) == ["a/0", "a/1", "z"]


def test_random_keys_are_hashed():
  one, two = (fingerprint({"k": jax.random.key(s)})["k"] for s in (1, 2))
  assert one != two
  assert one == _expected(jax.random.key_data(jax.random.key(1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 16 * 24 - 1), st.integers(0, 31))
def test_any_flipped_bit_is_seen_and_named(index, bit):
  x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  y = x.copy()
  y.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
  rest = {"b": jnp.ones(3), "c": {"d": jnp.int32(1)}}
  before, after = (fingerprint(rest | {"a": jnp.array(v)}) for v in (x, y))
  assert [path for path in before if before[path] != after[path]] == ["a"]


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_all_bits_of_a_wide_element_count(bit):
  x = np.arange(6, dtype=np.uint64)
  y = x.copy()
  y[3] ^= np.uint64(1) << np.uint64(bit)
  with jax.enable_x64(True):
    for dtype in (np.uint64, np.float64):
      one, two = (fingerprint(jnp.array(v.view(dtype))) for v in (x, y))
      assert one != two


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 383), st.integers(0, 383))
def test_exchanged_elements_are_seen(i, j):
  x = np.arange(384, dtype=np.float32)
  y = x.copy()
  y[[i, j]] = x[[j, i]]
  same = fingerprint(jnp.array(x)) == fingerprint(jnp.array(y))
  assert same == (i == j)


def test_it_makes_no_copy_of_a_leaf():
  x = jnp.zeros((64, 2**16))
  compiled = hashing._hash_leaf.lower(x, x.sharding).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 4
