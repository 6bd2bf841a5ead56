import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from adaptax.layers import Decoder, DecoderConfig
from adaptax.parallel import by_row, flat_mesh, fsdp, fsdp_spec, place


@pytest.mark.parametrize(
  "shape, spec",
  [
    ((576, 1536), P(None, "device")),
    ((1536, 576), P("device")),
    ((64, 576, 8), P(None, "device")),  # the layer axis is never cut
    ((64, 64, 64), P(None, None, "device")),
    ((30, 576), P(None, "device")),  # stacked scales
    ((30, 577), P()),  # nothing that 8 divides
    ((4096,), P("device")),
    ((576,), P()),  # too small to be worth a gather
    ((), P()),
  ],
)
def test_the_largest_divisible_dimension_is_cut(shape, spec):
  assert fsdp_spec(shape, 8) == spec


def test_one_device_cuts_nothing_that_matters():
  mesh = flat_mesh(jax.devices()[:1])
  array = place(np.ones((256, 256)), fsdp(np.ones((256, 256)), mesh))
  assert array.sharding.is_fully_replicated


def test_placed_arrays_hold_the_host_values_cut_over_all_devices():
  mesh = flat_mesh()
  host = {"w": np.arange(2048.0).reshape(8, 256)}
  placed = place(host, fsdp(host, mesh))
  np.testing.assert_array_equal(placed["w"], host["w"])
  assert placed["w"].addressable_shards[0].data.size == 2048 // 8


def test_batches_are_cut_by_row():
  mesh = flat_mesh()
  assert by_row(mesh).spec == P("device")
  assert by_row(mesh, 1).spec == P(None, "device")


def test_stacked_model_state_is_spread_evenly():
  mesh = flat_mesh()
  config = DecoderConfig(512, 128, 256, 3, 4, 2)
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  state = nnx.to_pure_dict(nnx.state(model))
  local = total = 0
  for leaf, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(fsdp(state, mesh))
  ):
    total += leaf.size
    local += np.prod(sharding.shard_shape(leaf.shape))
  assert total / 8 <= local < 1.02 * total / 8
  assert jnp.dtype(leaf.dtype) == jnp.float32
