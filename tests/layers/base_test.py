"""The adapter protocol: rules by path, stacks, counts and merging."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.layers import stack
from adaptax.layers.adapters import (
  ADAPTERS,
  Adapter,
  AdapterParam,
  LoRA,
  adapt,
  adapters,
  count,
  merge,
  replace_linear,
  trainable,
  trainable_filter,
)


def lora(rank=2, **arguments):
  return functools.partial(LoRA, rank=rank, **arguments)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.q = nnx.Linear(8, 6, rngs=rngs)
    self.k = nnx.Linear(8, 4, use_bias=False, rngs=rngs)


class Model(nnx.Module):
  """Linear maps at the top, in a list, and in a stack of three blocks."""

  def __init__(self, rngs):
    self.norm = nnx.RMSNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 10, rngs=rngs)
    self.parts = nnx.List([Block(rngs), Block(rngs)])
    self.layers = stack(Block, 3, rngs=rngs)


@pytest.fixture(scope="module")
def model():
  return Model(nnx.Rngs(0))


def wrapped(model, rules):
  """Ranks of the adapters by path."""
  adapted = nnx.eval_shape(lambda: adapt(model, rules, rngs=nnx.Rngs(0)))
  return {path: module.rank for path, module, _ in adapters(adapted)}


@pytest.mark.parametrize(
  "rules, expected",
  [
    ({"head": 2}, {"head": 2}),
    ({"layers/q": 2}, {"layers/q": 2}),
    ({"parts/1/.*": 2}, {"parts/1/q": 2, "parts/1/k": 2}),
    ({"q": 2}, {"layers/q": 2, "parts/0/q": 2, "parts/1/q": 2}),
    ({"parts/0/q": 3, "q": 1},
     {"layers/q": 1, "parts/0/q": 3, "parts/1/q": 1}),
    ({"layers/(q|k)": 4, "head": 1},
     {"layers/q": 4, "layers/k": 4, "head": 1}),
  ],
)  # fmt: skip
def test_the_first_rule_that_matches_a_path_wins(model, rules, expected):
  rules = {rule: lora(rank) for rule, rank in rules.items()}
  assert wrapped(model, rules) == expected


@pytest.mark.parametrize(
  "rules, words",
  [
    (["heat"], "rule 'heat' matches no linear map; close paths: head"),
    (["ead"], "rule 'ead' matches no linear map; close paths: head"),
    (["norm"], "rule 'norm' matches no linear map"),
    (["layers/qq", "q"], "rule 'layers/qq' matches no linear map; close paths"
     ": layers/q"),
    (["(q"], "rule '(q' is no regular expression: missing ), unterminated"),
    ([".*", "(k"], "rule '(k' is no regular expression"),
    (["q", "layers/q"], "rule 'layers/q' has no effect: earlier rules match"
     " first wherever it matches"),
  ],
)  # fmt: skip
def test_a_rule_without_effect_is_an_error(model, rules, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    adapt(model, dict.fromkeys(rules, lora()), rngs=nnx.Rngs(0))


def test_a_factorys_error_names_the_path(model):
  with pytest.raises(ValueError, match=r"^layers/k: rank 5 does not fit"):
    adapt(model, {"layers/k": lora(5)}, rngs=nnx.Rngs(0))


def test_a_model_that_is_one_linear_map():
  base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  model = adapt(base, {".*": lora()}, rngs=nnx.Rngs(0))
  assert isinstance(model, LoRA)
  assert [(path, size) for path, _, size in adapters(model)] == [("", None)]
  x = jnp.ones((2, 4))
  np.testing.assert_array_equal(model(x), base(x))
  merged = merge(model)
  assert type(merged) is nnx.Linear
  np.testing.assert_array_equal(merged.kernel[...], base.kernel[...])


def test_layers_of_a_stack_start_apart_and_single_maps_too(model):
  adapted = adapt(model, {"q": lora()}, rngs=nnx.Rngs(0))
  found = {path: (module, size) for path, module, size in adapters(adapted)}
  stacked, size = found["layers/q"]
  assert size == 3 and stacked.a.shape == (3, 8, 2)
  assert stacked.b.shape == (3, 2, 6)
  parts = [found[f"parts/{i}/q"][0].a[...][None] for i in (0, 1)]
  values = np.concatenate([stacked.a[...], *parts])[:, 0, 0]
  assert len(np.unique(values)) == 5


def test_adapting_leaves_the_model_and_shares_its_arrays(model):
  before = nnx.graphdef(model)
  adapted = adapt(model, {"head|layers/q": lora()}, rngs=nnx.Rngs(0))
  assert nnx.graphdef(model) == before and not adapters(model)
  assert adapted.head.base.kernel[...] is model.head.kernel[...]
  assert adapted.parts[0].q.kernel[...] is model.parts[0].q.kernel[...]


def test_merging_leaves_the_adapted_model_and_restores_the_structure(model):
  adapted = adapt(model, {"q|head": lora(alpha=4.0)}, rngs=nnx.Rngs(0))
  for _, adapter, _ in adapters(adapted):
    adapter.b[...] = jnp.ones_like(adapter.b[...])
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(adapted)))
  merged = merge(adapted)
  assert nnx.graphdef(merged) == nnx.graphdef(model)
  assert len(adapters(adapted)) == 4 and not adapters(merged)
  after = nnx.to_pure_dict(nnx.state(adapted))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  for pick in (lambda m: m.head, lambda m: m.parts[1].q, lambda m: m.layers.q):
    adapter = pick(adapted)
    change = 2 * np.asarray(adapter.a).sum(-1, keepdims=True)
    np.testing.assert_allclose(
      pick(merged).kernel[...], pick(model).kernel[...] + change, atol=1e-5
    )
    np.testing.assert_array_equal(pick(merged).bias[...], pick(model).bias[...])


def test_trainable_leaves_and_counts(model):
  bare = count(model)
  assert trainable_filter(model) is nnx.Param
  assert bare.trainable == bare.total
  adapted = adapt(
    model, {"head": lora(3), "layers/q": lora(2, dropout=0.1)},
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  assert trainable_filter(adapted) is AdapterParam
  paths = {"/".join(p) for p, _ in nnx.to_flat_state(trainable(adapted))}
  assert paths == {"head/a", "head/b", "layers/q/a", "layers/q/b"}
  counted = count(adapted)
  assert counted.trainable == 3 * (8 + 10) + 3 * 2 * (8 + 6)
  assert counted.total == bare.total + counted.trainable
  assert counted.trainable_bytes == 4 * counted.trainable
  assert counted.total_bytes == 4 * counted.total
  assert count(nnx.eval_shape(lambda: adapted)) == counted


def test_an_adapter_is_not_adapted_again(model):
  adapted = adapt(model, {"head": lora()}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="'head.*' matches no linear map"):
    adapt(adapted, {"head.*": lora()}, rngs=nnx.Rngs(0))


def test_maps_are_replaced_in_single_and_stacked_places(model):
  seen = []

  def make(rule, base, size):
    seen.append((rule, size))
    return nnx.RMSNorm(base.in_features, rngs=nnx.Rngs(0))

  replaced = replace_linear(model, ["head", "layers/q"], make)
  assert sorted(seen) == [("head", None), ("layers/q", 3)]
  assert isinstance(replaced.layers.q, nnx.RMSNorm)
  assert isinstance(model.layers.q, nnx.Linear)


def test_a_method_outside_the_library_needs_only_the_protocol(model):
  class Scale(Adapter):
    """Rescales outputs; y = gain * base(x)."""

    name = "scale"

    def __init__(self, base, *, rngs):
      self.base = base
      self.gain = AdapterParam(jnp.ones(base.out_features))

    def __call__(self, x):
      return self.gain[...] * self.base(x)

  adapted = adapt(model, {"layers/q|head": Scale}, rngs=nnx.Rngs(0))
  assert count(adapted).trainable == 10 + 3 * 6
  x = jnp.ones((2, 8))
  np.testing.assert_array_equal(adapted.head(x), model.head(x))
  with pytest.raises(NotImplementedError):
    merge(adapted)


def test_methods_are_found_by_name():
  assert ADAPTERS["lora"] is LoRA
  assert all(method.name == name for name, method in ADAPTERS.items())
