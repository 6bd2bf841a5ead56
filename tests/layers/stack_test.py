"""Stacked blocks behave like a list of blocks, at a constant program size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.layers.stack import REMAT_POLICIES, apply_stack, stack


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    return jnp.tanh(self.linear(x))


def step(block, carry, x):
  y = block(carry + x)
  return y, y.sum()


@pytest.fixture(scope="module")
def blocks():
  return stack(Block, 4, rngs=nnx.Rngs(0))


def one_by_one(blocks, x, xs):
  kernel, bias = (
    np.asarray(leaf[...], np.float64)
    for leaf in (blocks.linear.kernel, blocks.linear.bias)
  )
  ys = []
  for layer in range(4):
    x = np.tanh((x + xs[layer]) @ kernel[layer] + bias[layer])
    ys.append(x.sum())
  return x, np.array(ys)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_blocks_run_in_order(blocks, unroll, remat):
  x, xs = np.ones((2, 6), "f"), np.arange(4.0, dtype="f")
  result = apply_stack(blocks, step, x, xs, unroll=unroll, remat=remat)
  for actual, expected in zip(result, one_by_one(blocks, x, xs)):
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_every_block_has_its_own_first_values(blocks):
  kernels = np.asarray(blocks.linear.kernel[...])
  assert kernels.shape == (4, 6, 6)
  assert len(np.unique(kernels[:, 0, 0])) == 4


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialisation_keeps_the_gradients(blocks, remat):
  graphdef, state = nnx.split(blocks)

  def gradients(remat):
    def loss(state):
      x, ys = apply_stack(
        nnx.merge(graphdef, state), step, jnp.ones((2, 6)), jnp.ones(4),
        remat=remat,
      )  # fmt: skip
      return x.sum() + ys.sum()

    return jax.grad(loss)(state)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    gradients(remat),
    gradients("none"),
  )


@pytest.mark.parametrize("remat, kept", [("none", True), ("full", False)])
def test_gathered_weights_are_not_kept_under_remat(
  blocks, equations, remat, kept
):
  gather = lambda state: jax.tree.map(lambda leaf: leaf * 1.5, state)

  def loss(x):
    x, _ = apply_stack(blocks, step, x, jnp.ones(4), remat=remat, gather=gather)
    return x.sum()

  made = equations(jax.grad(loss), jnp.ones((2, 6)))
  shapes = [v.aval.shape for e in made for v in e.outvars]
  assert ((4, 6, 6) in shapes) == kept


def test_the_gather_is_what_a_block_computes_with(blocks):
  x, xs = np.ones((2, 6), "f"), np.zeros(4, "f")
  zero = lambda state: jax.tree.map(jnp.zeros_like, state)
  y, _ = apply_stack(blocks, step, x, xs, gather=zero)
  np.testing.assert_array_equal(y, np.zeros((2, 6)))
