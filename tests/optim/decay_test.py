import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptax.optim import BATCH_SIZES, decayed


def test_scales_and_biases_are_not_decayed_also_when_stacked():
  params = {
    "layers": {
      "norm": {"scale": jnp.ones((3, 4))},
      "q": {"base": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}},
      "v": {"a": jnp.ones((3, 4, 2)), "magnitude": jnp.ones((3, 4))},
    }
  }
  optimizer = optax.adamw(0.1, weight_decay=0.5, mask=decayed)
  zeros = {"layers": {
    "norm": {"scale": jnp.zeros((3, 4))},
    "q": {"base": {"kernel": jnp.zeros((3, 4, 4)), "bias": jnp.zeros((3, 4))}},
    "v": {"a": jnp.zeros((3, 4, 2)), "magnitude": jnp.zeros((3, 4))},
  }}  # fmt: skip
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  new = optax.apply_updates(params, updates)["layers"]
  for kept in (new["norm"]["scale"], new["q"]["base"]["bias"]):
    np.testing.assert_array_equal(kept, 1)
  np.testing.assert_array_equal(new["v"]["magnitude"], 1)
  np.testing.assert_allclose(new["q"]["base"]["kernel"], 0.95, rtol=1e-6)
  np.testing.assert_allclose(new["v"]["a"], 0.95, rtol=1e-6)


def test_a_batch_of_no_micro_batch_is_refused():
  with pytest.raises(ValueError, match="micro_batches 0"):
    BATCH_SIZES["constant"](0)
