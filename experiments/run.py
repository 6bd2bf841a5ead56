"""A run planned from its config: shapes, shardings and steps, no arrays yet.

`train` executes it, `compile_check` compiles it for absent hardware, `export`
and `generate` take its model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from adaptax.experiments import config as configs
from adaptax.experiments import models
from adaptax.experiments.data import Corpus, Data
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.step import make_eval_step, make_train_step
from adaptax.optim import decayed, schedule
from adaptax.parallel import by_row, place

Tree = Any


class Run:
  """What a config means on a mesh.

  Attributes:
    config: the complete config.
    mesh: all devices on one axis.
    source: the model before adapters.
    micro_batches: of one optimizer step.
    plan: how documents become micro-batches.
    model: structure and abstract arrays; `model.materialise()` makes them.
    learning_rate: schedule, as a function of the step.
    optimizer: the transform with that schedule.
  """

  def __init__(self, config: Any, mesh: Mesh):
    """Raises ValueError or OSError where the user has to change something."""
    _check(config)
    self.config = config
    # One key for the initial values, one for the steps.
    model_key, self._key = jax.random.split(jax.random.key(config.seed))
    self.mesh = mesh
    self.source = configs.build(config.model, REGISTRIES["model"])
    self.plan = configs.build(
      config.plan,
      REGISTRIES["plan"],
      devices=mesh.size,
      heads=self.source.config.num_heads,
    )
    self.model = models.prepare(
      self.source, adapter_rules(config.adapter), key=model_key, mesh=mesh
    )
    self.micro_batches = configs.build(
      config.batch_size, REGISTRIES["batch_size"]
    ).micro_batches
    self.learning_rate = _learning_rate(config)
    self.optimizer = _optimizer(config.optimizer, self.learning_rate)

  @functools.cached_property
  def state(self) -> Tree:
    """The train state as shapes that know their shardings."""
    trainable = self.model.split.trainable
    rest = {
      "step": jax.ShapeDtypeStruct((), jnp.int32),
      "optimizer": jax.eval_shape(self.optimizer.init, trainable),
    }
    return models.sharded(rest, self.mesh) | {"trainable": trainable}

  def initial_state(self, trainable: Tree) -> Tree:
    """The train state of step 0."""
    step, optimizer = _shardings((self.state["step"], self.state["optimizer"]))
    init = jax.jit(self.optimizer.init, out_shardings=optimizer)
    return {
      "step": place(np.int32(0), step),
      "trainable": trainable,
      "optimizer": init(trainable),
    }

  def module(self, trainable: Tree, frozen: Tree) -> nnx.Module:
    """The model in evaluation mode, as one object again."""
    return nnx.merge(self.model.split.eval, trainable, frozen)

  def train_step(self):
    """Jitted `(state, frozen, batch) -> (state, metrics)`, state donated."""
    c = self.config
    step = make_train_step(
      self.model.split.train,
      self.optimizer,
      self.plan.attention(self.mesh),
      key=self._key,
      chunk=c.loss_chunk or None,
      find_nonfinite=c.find_nonfinite,
    )
    shardings = _shardings(self.state), None
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)

  def eval_step(self):
    """Jitted `(trainable, frozen, batch) -> (summed loss, weight)`."""
    c = self.config
    return jax.jit(
      make_eval_step(
        self.model.split.eval,
        self.plan.attention(self.mesh),
        c.loss_chunk or None,
      )
    )

  def abstract_batch(self) -> Tree:
    """The batch of a train step as shapes that know their shardings."""
    piece = Corpus(("",), np.array([2]), np.zeros(2, int), np.ones(2, bool))
    example = Data(piece, piece, self.plan.tokens, "")
    arrays = self.plan.eval_batches(example, 1)[0]
    sharding = by_row(self.mesh, 1)
    return {
      name: jax.ShapeDtypeStruct(
        (self.micro_batches, *array.shape), array.dtype, sharding=sharding
      )
      for name, array in arrays.items()
    }

  def place_batch(self, arrays: dict[str, np.ndarray]) -> Tree:
    """Cuts host arrays by row over the devices.

    Args:
      arrays: (micro_batches, rows, ...), or (rows, ...) to evaluate.
    """
    sharding = by_row(self.mesh, arrays["tokens"].ndim - 2)
    return place(arrays, dict.fromkeys(arrays, sharding))


def _check(config) -> None:
  """Refuses numbers that no part of a run could use."""
  least = {
    "steps": 1,
    "seed": 0,
    "loss_chunk": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "eval.every": 0,
    "eval.windows": 1,
    "profile.start": 0,
    "profile.steps": 0,
  }
  for key, bound in least.items():
    section, _, leaf = key.rpartition(".")
    value = (config[section] if section else config)[leaf]
    if value < bound:
      raise ValueError(f"{key} is {value}, the least is {bound}")
  tokens, chunk = config.plan.tokens, config.loss_chunk
  if tokens < 2:
    raise ValueError(f"plan.tokens is {tokens}, the least is 2")
  if chunk and tokens % chunk:
    raise ValueError(
      f"loss_chunk {chunk} does not divide the {tokens} tokens of a row"
    )


def adapter_rules(section: Any) -> dict[str, Any]:
  """Returns the rules of `adapt`: the section's exceptions, then its targets.

  `rules` holds pairs of a path expression and the arguments that differ
  there.
  """
  if section.name == "none":
    return {}
  registry, special = REGISTRIES["adapter"], {}
  for rule in section.rules:
    match rule:
      case (str(path), dict(changes)):
        key = f"adapter.rules[{path!r}]"
        special[path] = configs.bind(section, registry, changes, key)
      case _:
        raise ValueError(
          f"config key adapter.rules: {rule!r} is no pair of a path expression"
          " and {argument: value}"
        )
  special.setdefault(section.targets, configs.bind(section, registry))
  return special


def _learning_rate(config) -> optax.Schedule:
  c = config.optimizer
  return schedule(c.schedule, c.learning_rate, config.steps, c.warmup, c.final)


def _optimizer(section, rate) -> optax.GradientTransformation:
  optimizer = configs.build(
    section,
    REGISTRIES["optimizer"],
    learning_rate=rate,
    mask=decayed,
    weight_decay_mask=decayed,
  )
  if not section.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(section.clip_norm), optimizer)


def _shardings(tree: Tree) -> Tree:
  return jax.tree.map(lambda leaf: leaf.sharding, tree)
