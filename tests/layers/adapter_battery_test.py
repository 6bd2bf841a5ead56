"""What every adapter must do; a method joins by a line in CASES."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptax.layers import Decoder, DecoderConfig, reseed
from adaptax.layers.adapters import (
  ADAPTERS,
  AdapterParam,
  adapt,
  adapters,
  count,
  merge,
  trainable,
)
from adaptax.layers.linear import kernel_of, with_kernel
from adaptax.layers.quantized import QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Case:
  """A method, its arguments, and what it promises.

  Attributes:
    name: in `ADAPTERS`.
    arguments: of the constructor.
    identity: how far the first logits may be from those of the base; zero is
      bit for bit, None is no promise.
    mergeable: whether the change is a linear map.
    quantized: whether it serves a quantised base.
    factored: whether no array of the kernel's size is made.
  """

  name: str
  arguments: Mapping[str, Any]
  identity: float | None = 0.0
  mergeable: bool = True
  quantized: bool = True
  factored: bool = True

  def __str__(self):
    return "-".join(
      (self.name, *(f"{k}={v}" for k, v in self.arguments.items()))
    )

  @property
  def factory(self):
    return functools.partial(ADAPTERS[self.name], **self.arguments)


# fmt: off
CASES = [
  Case("lora", {"rank": 4}),
  Case("lora", {"rank": 4, "use_rslora": True, "dropout": 0.2}),
  Case("lora", {"rank": 4, "use_dora": True, "dropout": 0.2}, identity=1e-5, factored=False),
  Case("lora", {"rank": 4, "init": "pissa"}, identity=1e-5, quantized=False),
  Case("lora", {"rank": 4, "init": "olora"}, identity=1e-5, quantized=False),
]
# fmt: on

TARGETS = "attention/v|mlp/up"


class Member:
  """A case on the tiny decoder; one compiled step serves all its tests."""

  def __init__(self, case: Case, tiny):
    self.case, self.tiny = case, tiny
    self.base = tiny.model(qkv_bias=True)
    graphdef, state = nnx.split(self.base)
    make = lambda state: self.adapt(nnx.merge(graphdef, state))
    structure = nnx.graphdef(nnx.eval_shape(make, state))
    state = jax.jit(lambda state: nnx.state(make(state)))(state)
    self.model = nnx.merge(structure, state)
    self.moved = moved(self.model)
    self.optimizer = optax.adam(1e-2)
    self.traces = 0
    self.step = jax.jit(self._step)

  def adapt(self, model):
    return adapt(model, {TARGETS: self.case.factory}, rngs=nnx.Rngs(1))

  def _step(self, some, state, frozen, batch, key):
    self.traces += 1

    def loss(some):
      model = nnx.merge(nnx.graphdef(self.model), some, frozen)
      reseed(model, key)
      logits = self.tiny.forward(model, batch)[:, :-1]
      each = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["tokens"][:, 1:]
      )
      return each.mean(), split(model)[1]

    (value, frozen), gradients = jax.value_and_grad(loss, has_aux=True)(some)
    updates, state = self.optimizer.update(gradients, state, some)
    some = optax.apply_updates(some, updates)
    return value, gradients, some, state, frozen

  def first_step(self, model, seed=0):
    """Returns what one step makes of a model."""
    some, frozen = split(model)
    state = self.optimizer.init(some)
    key = jax.random.key(seed)
    return self.step(some, state, frozen, self.tiny.batch, key)


def split(model):
  """Returns the trainable and the other leaves as pure dicts."""
  _, *states = nnx.split(model, AdapterParam, ...)
  return [nnx.to_pure_dict(state) for state in states]


def flat(state) -> dict[str, jax.Array]:
  """Returns the leaves of a pure dict by path, without random streams."""
  leaves = nnx.traversals.flatten_mapping(state, sep="/")
  return {path: leaf for path, leaf in leaves.items() if "/rngs/" not in path}


def moved(model):
  """Returns the model with its trainable leaves off their first values."""
  model = nnx.clone(model)
  rng = np.random.default_rng(2)
  noise = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
  nnx.update(model, jax.tree.map(noise, trainable(model)))
  return model


def evaluated(model):
  model = nnx.clone(model)
  model.eval()
  return model


def single(case, dtype=jnp.float32, wrap=lambda base: base):
  """Returns the adapter on one map from 96 to 32, moved, without dropout."""
  rng = np.random.default_rng(3)
  base = nnx.Linear(96, 32, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
  base.kernel[...] = jnp.asarray(0.1 * rng.standard_normal((96, 32)), dtype)
  base.bias[...] = jnp.asarray(rng.standard_normal(32), dtype)
  return evaluated(moved(case.factory(wrap(base), rngs=nnx.Rngs(1))))


def inputs(adapter, dtype=jnp.float32):
  """Returns what `backward` takes of an adapter, and an x for it."""
  x = np.random.default_rng(4).standard_normal((8, 96))
  return *split(adapter), jnp.asarray(x, dtype)


@functools.partial(jax.jit, static_argnums=0)
def backward(graphdef, some, frozen, x):
  """Returns y and the gradients of its square in `some` and x."""

  def loss(some, x):
    y = nnx.merge(graphdef, some, frozen)(x)
    return jnp.square(y.astype(jnp.float32)).mean(), y

  gradients, y = jax.grad(loss, (0, 1), has_aux=True)(some, x)
  return y, gradients


def close(actual, desired, atol):
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired)):
    x, y = (np.asarray(leaf, np.float32) for leaf in (x, y))
    np.testing.assert_allclose(x, y, rtol=atol, atol=atol)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
  return request.param


@pytest.fixture(scope="module")
def member(case, tiny):
  return Member(case, tiny)


def test_the_first_logits_are_those_of_the_base(member, tiny):
  if member.case.identity is None:
    pytest.skip("not promised")
  first, base = tiny.logits(evaluated(member.model)), tiny.logits(member.base)
  np.testing.assert_allclose(first, base, rtol=0, atol=member.case.identity)


def test_merging_keeps_the_logits(member, tiny):
  if not member.case.mergeable:
    with pytest.raises(ValueError):
      merge(member.moved)
    return
  logits = tiny.logits(evaluated(member.moved))
  merged = merge(member.moved)
  assert nnx.graphdef(merged) == nnx.graphdef(member.base)
  np.testing.assert_allclose(tiny.logits(merged), logits, atol=1e-4)
  assert np.abs(tiny.logits(member.base) - logits).max() > 0.01


def test_training_moves_the_adapter_alone(member):
  first, unchanged = (flat(leaves) for leaves in split(member.model))
  losses = []
  some, frozen = split(member.model)
  state = member.optimizer.init(some)
  for step in range(4):
    loss, _, some, state, rest = member.step(
      some, state, frozen, member.tiny.batch, jax.random.key(step)
    )
    losses.append(float(loss))
  assert member.traces == 1
  assert losses[-1] < losses[0]
  assert flat(rest).keys() == unchanged.keys()
  for path, leaf in flat(rest).items():
    assert leaf.tobytes() == unchanged[path].tobytes(), path
  for path, leaf in flat(some).items():
    assert (leaf != first[path]).any(), path


def test_gradients_exist_in_trainable_leaves_alone(member):
  _, gradients, *_ = member.first_step(member.moved)
  leaves = flat(gradients)
  assert leaves.keys() == flat(split(member.model)[0]).keys()
  for path, leaf in leaves.items():
    assert np.isfinite(leaf).all() and leaf.any(), path
  assert member.traces == 1


def test_dropout_follows_the_key(member):
  losses = [float(member.first_step(member.moved, s)[0]) for s in (0, 0, 1)]
  assert losses[0] == losses[1]
  stochastic = member.case.arguments.get("dropout", 0) > 0
  assert (losses[1] != losses[2]) == stochastic


def test_a_loop_over_blocks_equals_the_scan(member, tiny):
  model = evaluated(member.moved)
  scanned = tiny.logits(model)
  model.config = dataclasses.replace(model.config, scan_layers=False)
  np.testing.assert_allclose(tiny.logits(model), scanned, rtol=0, atol=1e-5)


def test_a_slice_of_a_stack_is_an_adapter_of_one_layer(member):
  graphdef, state = nnx.split(evaluated(member.moved).layers.attention.v)
  second = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[1], state))
  base = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
  alone = evaluated(member.case.factory(base, rngs=nnx.Rngs(0)))
  shapes = lambda module: jax.tree.map(jnp.shape, split(module))
  assert shapes(alone) == shapes(second)
  nnx.update(alone, nnx.state(second))
  x = jnp.ones((3, 32))
  close(alone(x), second(x), 1e-6)


def test_saving_and_loading_keeps_every_bit(member, tiny, tmp_path):
  model, fresh = evaluated(member.moved), evaluated(member.model)
  some, rest = split(model)
  file = tmp_path / "model.safetensors"
  safetensors.flax.save_file(flat(some) | flat(rest), file)
  loaded = safetensors.flax.load_file(file)
  for path, leaf in nnx.to_flat_state(nnx.state(fresh)):
    if not isinstance(leaf, nnx.RngState):
      leaf.set_value(loaded.pop("/".join(path)))
  assert not loaded
  np.testing.assert_array_equal(tiny.logits(fresh), tiny.logits(model))


def test_bfloat16(case):
  full, half = single(case), single(case, jnp.bfloat16)
  nnx.update(half, trainable(full))
  y, (gradients, _) = backward(nnx.graphdef(half), *inputs(half, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((trainable(half), gradients)):
    assert leaf.dtype == jnp.float32
  close(y, backward(nnx.graphdef(full), *inputs(full))[0], 0.1)
  if case.mergeable:
    assert half.merge().kernel.dtype == jnp.bfloat16


def test_a_quantised_base_serves_like_its_plain_kernel(case):
  if not case.quantized:
    with pytest.raises(ValueError, match="quantised"):
      single(case, wrap=QuantizedLinear)
    return
  plain = lambda base: with_kernel(base, kernel_of(QuantizedLinear(base)))
  both = [single(case, wrap=wrap) for wrap in (QuantizedLinear, plain)]
  close(*(backward(nnx.graphdef(each), *inputs(each)) for each in both), 1e-5)
  if case.mergeable:
    close(*(each.merge().kernel[...] for each in both), 1e-5)


def test_many_devices_give_the_same_gradients(case):
  """Parameters are cut over all devices, and so are the rows of x."""
  mesh = Mesh(np.array(jax.devices()), ("device",))

  def place(leaf):
    cut = next(
      (i for i, n in enumerate(leaf.shape) if n % mesh.size == 0), None
    )
    axes = ("device" if i == cut else None for i in range(leaf.ndim))
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

  adapter = single(case)
  graphdef, arguments = nnx.graphdef(adapter), inputs(adapter)
  many = backward(graphdef, *jax.tree.map(place, arguments))
  assert len(many[0].sharding.device_set) == 8
  close(many, backward(graphdef, *arguments), 1e-5)


def test_no_array_of_the_kernels_size_is_made(case, equations):
  if not case.factored:
    pytest.skip("not promised")
  adapter = single(case)
  run = functools.partial(backward, nnx.graphdef(adapter))
  made = equations(run, *inputs(adapter))
  sizes = [variable.aval.size for e in made for variable in e.outvars]
  assert 8 * 96 <= max(sizes) < 96 * 32


def test_a_7b_model_is_adapted_without_memory(member):
  config = DecoderConfig(32000, 4096, 11008, 32, 32, 32, dtype="bfloat16")
  model = nnx.eval_shape(
    lambda: member.adapt(Decoder(config, rngs=nnx.Rngs(0)))
  )
  assert {size for _, _, size in adapters(model)} == {32}
  for leaf in jax.tree.leaves(trainable(model)):
    assert leaf.shape[0] == 32
  assert 0 < count(model).trainable < 0.1 * count(model).total
