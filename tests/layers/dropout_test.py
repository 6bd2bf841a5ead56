"""Dropout masks follow the key that a step reseeds with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptax.layers import apply_stack, reseed, stack


def masks(model, seed):
  """Where each of the three layers' dropout lets the ones through."""
  reseed(model, jax.random.key(seed))
  ones = jnp.ones(64)
  _, ys = apply_stack(model, lambda block, x, _: (x, block(ones) > 0), ones)
  return np.asarray(ys)


def test_masks_depend_on_the_key_and_the_layer_alone():
  model = stack(lambda rngs: nnx.Dropout(0.5, rngs=rngs), 3, rngs=nnx.Rngs(0))
  first = masks(model, 1)
  assert 0.3 < first.mean() < 0.7
  assert (first[0] != first[1]).any() and (first[1] != first[2]).any()
  assert (masks(model, 2) != first).any()
  np.testing.assert_array_equal(masks(model, 1), first)


def test_streams_of_single_and_stacked_modules_differ():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.Dropout(0.5, rngs=rngs)
      self.many = stack(lambda rngs: nnx.Dropout(0.5, rngs=rngs), 2, rngs=rngs)

  model = Model(nnx.Rngs(params=0, dropout=1))
  before = model.one.rngs.key[...]
  reseed(model, jax.random.key(3))
  assert model.many.rngs.key.shape == (2,)
  keys = jax.random.key_data(
    jnp.concatenate([model.one.rngs.key[...][None], model.many.rngs.key[...]])
  )
  assert len(np.unique(np.asarray(keys), axis=0)) == 3
  assert (model.one.rngs.key[...] != before).all()


def test_a_model_without_streams_is_left_alone():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  reseed(model, jax.random.key(0))
  assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
