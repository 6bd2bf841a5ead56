"""The train and evaluation steps: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptax.layers import reseed
from adaptax.layers.adapters import trainable_filter

Batch = dict[str, jax.Array]
State = dict[str, Any]
# Makes a model's attention function from the arrays of one micro-batch.
Attention = Callable[[Batch], Callable[..., jax.Array]]


class Split(NamedTuple):
  """A model as `jax.jit` wants it: structure apart from arrays.

  Attributes:
    train: graph definition in training mode (dropout on).
    eval: graph definition in evaluation mode.
    trainable: pure dict of the arrays that the optimizer changes.
    frozen: pure dict of all other arrays, random streams included.
  """

  train: nnx.GraphDef
  eval: nnx.GraphDef
  trainable: Any
  frozen: Any


def split(model: nnx.Module) -> Split:
  """Splits a model, also an abstract one, by what a run trains."""
  wrt = trainable_filter(model)
  model.eval()
  evaluation = nnx.graphdef(model)
  model.train()
  graphdef, *states = nnx.split(model, wrt, ...)
  return Split(graphdef, evaluation, *map(nnx.to_pure_dict, states))


def token_losses(
  model: Any, batch: Batch, attend: Any, chunk: int | None = None
) -> jax.Array:
  """Returns the weighted sum of next-token losses in nats, float32 scalar.

  Args:
    model: a decoder.
    batch: arrays (rows, T) of tokens, targets, weights and positions.
    attend: the model's attention function.
    chunk: tokens of a row whose logits exist at a time; None means all. The
      logits of a long row with a large vocabulary outweigh everything else.
  """
  model.fetch_ends()
  features = model.features(batch["tokens"], batch["positions"], attend)

  def losses(features, targets, weights):
    logits = model.logits(features).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.vdot(each, weights)

  inputs = features, batch["targets"], batch["weights"]
  if chunk is None or chunk >= features.shape[1]:
    return losses(*inputs)
  rows, length = batch["tokens"].shape
  if length % chunk:
    raise ValueError(f"loss chunk {chunk} does not divide a row of {length}")
  inputs = jax.tree.map(
    lambda x: jnp.moveaxis(
      x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0
    ),
    inputs,
  )
  body = jax.checkpoint(
    lambda total, chunk: (total + losses(*chunk), None), prevent_cse=False
  )
  return jax.lax.scan(body, jnp.float32(0), inputs)[0]


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  attention: Attention,
  *,
  key: jax.Array,
  chunk: int | None = None,
  find_nonfinite: bool = False,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, Any]]]:
  """Returns `step(state, frozen, batch) -> (state, metrics)`.

  The state holds `step`, `trainable` and `optimizer`; its buffers may be
  donated. The batch holds arrays (micro_batches, rows, T), whose gradients are
  summed over tokens and divided once by the global weight. Dropout keys come
  from `key`, the step and the micro-batch, so that resuming is exact.
  """

  def loss(trainable, frozen, batch, key):
    model = nnx.merge(graphdef, trainable, frozen)
    reseed(model, key)
    return token_losses(model, batch, attention(batch), chunk)

  def step(state, frozen, batch):
    step_key = jax.random.fold_in(key, state["step"])
    count = batch["tokens"].shape[0]
    weight = batch["weights"].sum()
    total, gradients = _accumulate(
      jax.value_and_grad(loss),
      state["trainable"],
      frozen,
      batch,
      step_key,
      count,
    )
    # In the type of the parameters, whose optimizer state keeps its own.
    gradients = jax.tree.map(
      lambda g, p: (g / weight).astype(p.dtype), gradients, state["trainable"]
    )
    updates, optimizer_state = optimizer.update(
      gradients, state["optimizer"], state["trainable"]
    )
    metrics = {
      "loss": total / weight,
      "gradient_norm": optax.tree.norm(gradients),
      "update_norm": optax.tree.norm(updates),
      "weight": weight,
    }
    if find_nonfinite:
      trees = {"trainable": state["trainable"], "frozen": frozen}
      metrics["finite"] = finite_leaves(trees | {"gradient": gradients})
    new_state = {
      "step": state["step"] + 1,
      "trainable": optax.apply_updates(state["trainable"], updates),
      "optimizer": optimizer_state,
    }
    return new_state, metrics

  return step


def _accumulate(value_and_grad, trainable, frozen, batch, key, count):
  """Sums loss and gradients over micro-batches in float32."""

  def one(index):
    micro = jax.tree.map(lambda x: x[index], batch)
    micro_key = jax.random.fold_in(key, index)
    return value_and_grad(trainable, frozen, micro, micro_key)

  if count == 1:
    return one(0)

  def body(index, total):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, one(index))

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable
  )
  total, gradients = jax.lax.fori_loop(0, count, body, (jnp.float32(0), zeros))
  return total, gradients


def make_eval_step(
  graphdef: nnx.GraphDef, attention: Attention, chunk: int | None = None
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
  """Returns `step(trainable, frozen, batch) -> (summed loss, weight)`.

  The batch holds arrays (rows, T).
  """

  def step(trainable, frozen, batch):
    model = nnx.merge(graphdef, trainable, frozen)
    loss = token_losses(model, batch, attention(batch), chunk)
    return loss, batch["weights"].sum()

  return step


def finite_leaves(tree: Any) -> dict[str, jax.Array]:
  """Returns for each floating leaf, by path, whether all of it is finite."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): jnp.isfinite(
      leaf
    ).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
