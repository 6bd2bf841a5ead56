"""The train step against plain JAX on the whole batch, and across devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax.experiments import config as configs
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.report import check_finite
from adaptax.experiments.run import Run
from adaptax.experiments.step import token_losses
from adaptax.optim import OPTIMIZERS
from adaptax.pallas_kernels.packed_attention import packed_attention
from adaptax.parallel import flat_mesh

LORA = {"adapter.name": "lora", "adapter.rank": 2}


def batch(micro=1, rows=8, length=16, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 64, (micro, rows, length + 1), dtype=np.int32)
  start = np.zeros((micro, rows, length), np.int32)
  start[..., 5:] = 5
  weights = rng.integers(0, 2, (micro, rows, length)).astype(np.float32)
  return {
    "tokens": tokens[..., :-1],
    "targets": tokens[..., 1:],
    "weights": weights,
    "positions": np.arange(length, dtype=np.int32) - start,
    "start": start,
  }


class Job:
  """A tiny run with its arrays; calling it takes one step."""

  def __init__(self, devices=1, /, **changes):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = configs.load("tiny")
    config.model.update(shape)
    config.optimizer = {"name": "sgd", "learning_rate": 1.0}
    for key, value in changes.items():
      section, _, leaf = key.rpartition(".")
      (config[section] if section else config)[leaf] = value
    config = configs.check(config, REGISTRIES)
    self.run = Run(config, flat_mesh(jax.devices()[:devices]))
    trainable, self.frozen = self.run.model.materialise()
    self.state = self.run.initial_state(trainable)
    self.step = self.run.train_step()

  def __call__(self, arrays):
    arrays = self.run.place_batch(arrays)
    self.state, metrics = self.step(self.state, self.frozen, arrays)
    return jax.device_get(metrics)


def reference(job, arrays):
  """Mean loss over all tokens at once and its gradients, in plain JAX."""
  flat = {k: v.reshape(-1, v.shape[-1]) for k, v in arrays.items()}

  def loss(trainable):
    model = job.run.module(trainable, job.frozen)
    attend = functools.partial(packed_attention, start=flat["start"])
    logits = model(flat["tokens"], flat["positions"], attend)
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), flat["targets"][..., None], -1
    )[..., 0]
    return -(picked * flat["weights"]).sum() / flat["weights"].sum()

  return jax.jit(jax.value_and_grad(loss))(job.state["trainable"])


def close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      a, e, rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_are_those_of_the_mean_over_all_tokens(changes, micro):
  job, arrays = Job(**changes), batch(micro)
  before = jax.device_get(job.state["trainable"])
  loss, gradients = reference(job, arrays)
  metrics = job(arrays)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
  np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-5)
  assert metrics["weight"] == arrays["weights"].sum()
  close(
    job.state["trainable"], jax.tree.map(lambda p, g: p - g, before, gradients)
  )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_eight_devices_train_as_one(changes):
  # A large eps, since Adam magnifies what float32 cannot tell from zero.
  changes = changes | {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.01,
    "optimizer.eps": 1e-3,
  }
  one, many = Job(1, **changes), Job(8, **changes)
  close(many.state["trainable"], one.state["trainable"], 0)
  for seed in range(3):
    arrays = batch(2, seed=seed)
    losses = one(arrays)["loss"], many(arrays)["loss"]
    np.testing.assert_allclose(*losses, rtol=1e-5)
  close(many.state["trainable"], one.state["trainable"], 1e-4)
  assert one.step._cache_size() == many.step._cache_size() == 1
  shapes = [
    leaf.sharding.shard_shape(leaf.shape)
    for leaf in jax.tree.leaves(many.state)
  ]
  assert shapes == [
    leaf.sharding.shard_shape(leaf.shape)
    for leaf in jax.tree.leaves(many.run.state)
  ]


def test_loss_in_chunks_equals_loss_at_once():
  whole, chunked, arrays = Job(), Job(loss_chunk=4), batch()
  np.testing.assert_allclose(
    whole(arrays)["loss"], chunked(arrays)["loss"], rtol=1e-6
  )
  close(whole.state["trainable"], chunked.state["trainable"])


def test_a_chunk_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="chunk 5 does not divide the 128"):
    Job(loss_chunk=5)
  job = Job()
  arrays = {k: v[0] for k, v in batch().items()}
  model = job.run.module(job.state["trainable"], job.frozen)
  attend = job.run.plan.attention(job.run.mesh)(arrays)
  with pytest.raises(ValueError, match="chunk 5 does not divide a row of 16"):
    token_losses(model, arrays, attend, 5)


def test_dropout_differs_by_step_and_is_off_in_evaluation():
  changes = LORA | {
    "adapter.init": "random",
    "adapter.dropout": 0.5,
    "optimizer.learning_rate": 0.0,
  }
  job, again, arrays = Job(**changes), Job(**changes), batch()
  losses = [float(job(arrays)["loss"]) for _ in range(3)]
  assert len(set(losses)) == 3
  assert [float(again(arrays)["loss"]) for _ in range(3)] == losses
  micro = job.run.place_batch({k: v[0] for k, v in arrays.items()})
  total, weight = job.run.eval_step()(job.state["trainable"], job.frozen, micro)
  expected, _ = reference(job, arrays)
  np.testing.assert_allclose(total / weight, expected, rtol=1e-6)


def test_the_first_tensor_that_is_not_finite_is_named():
  job = Job(find_nonfinite=True)
  norm = job.state["trainable"]["layers"]["mlp_norm"]
  norm["scale"] = norm["scale"].at[1, 3].set(np.nan)
  metrics = job(batch())
  assert np.isnan(metrics["loss"])
  with pytest.raises(
    FloatingPointError, match="at step 7; .* trainable/layers/mlp_norm/scale"
  ):
    check_finite(7, metrics)


def test_a_finite_step_passes_and_a_bad_one_says_how_to_learn_more():
  values = {"loss": 1.0, "gradient_norm": 1.0, "update_norm": 1.0}
  check_finite(1, values)
  with pytest.raises(FloatingPointError, match="find_nonfinite=True"):
    check_finite(1, values | {"update_norm": np.inf})


def test_rows_that_the_devices_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="plan.rows 6 .* 8 devices"):
    Job(8, **{"plan.rows": 6})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_every_type_also_of_bfloat16_weights(name):
  job = Job(**{"model.param_dtype": "bfloat16", "optimizer.name": name})
  arrays = jax.eval_shape(job.run.place_batch, batch(2))
  after, _ = jax.eval_shape(job.step, job.state, job.frozen, arrays)
  types = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  assert types(after) == types(job.state)


def test_losses_are_float32_sums_also_in_bfloat16():
  job, arrays = Job(**{"model.dtype": "bfloat16"}), batch()
  loss = job(arrays)["loss"]
  assert loss.dtype == np.float32
  assert abs(loss - np.log(64)) < 0.3
