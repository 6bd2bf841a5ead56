"""PEFT folders give PEFT's logits here, and come back byte for byte."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from adaptax.experiments.weights import peft
from adaptax.layers.adapters import Adapter, LoRA, adapt, adapters, merge

ADAPTERS = ("lora", "rslora", "dora")


def _tensors(folder):
  return safetensors.numpy.load_file(folder / peft.TENSORS)


@pytest.fixture(scope="module")
def base(golden, open_model):
  return open_model(golden / "llama")


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft(golden, base, logits, name):
  recorded = np.load(golden / name / "recorded.npz")
  model = peft.load_adapter(golden / name, base, rngs=nnx.Rngs(0))
  for each in (model, merge(model)):
    ours = logits(each, recorded["tokens"])
    np.testing.assert_allclose(ours, recorded["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peft_folder_comes_back_byte_for_byte(golden, base, tmp_path, name):
  model = peft.load_adapter(golden / name, base, rngs=nnx.Rngs(0))
  peft.save_adapter(tmp_path / "out", model, "llama")
  before, after = _tensors(golden / name), _tensors(tmp_path / "out")
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert value.dtype == after[key].dtype
    assert value.tobytes() == after[key].tobytes()
  old, new = (
    json.loads((folder / peft.CONFIG).read_text())
    for folder in (golden / name, tmp_path / "out")
  )
  old["target_modules"].sort()
  assert new == {key: old[key] for key in new}


def _perturbed(model):
  """The model with noise on every trainable leaf."""
  random = np.random.default_rng(0)
  for _, adapter, _ in adapters(model):
    for leaf in (adapter.a, adapter.b, adapter.magnitude):
      if leaf is not None:
        noise = 0.1 * random.standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(leaf[...] + noise, leaf.dtype))
  return model


@pytest.mark.parametrize(
  "init, flag",
  [("pissa", None), ("olora", "use_rslora"), ("pissa", "use_dora")],
)
def test_factors_taken_from_the_base_are_saved_for_the_original_base(
  base, logits, tmp_path, init, flag
):
  options = {"rank": 4, "init": init} | ({flag: True} if flag else {})
  rules = {"q|down": lambda base, rngs: LoRA(base, rngs=rngs, **options)}
  model = _perturbed(adapt(base, rules, rngs=nnx.Rngs(0)))
  peft.save_adapter(tmp_path / "out", model)
  loaded = peft.load_adapter(tmp_path / "out", base, rngs=nnx.Rngs(0))
  assert {a.rank for _, a, _ in adapters(loaded)} == {8}
  tokens = np.arange(16).reshape(2, 8)
  expected = logits(model, tokens)
  assert np.abs(expected - logits(base, tokens)).max() > 0.1
  np.testing.assert_allclose(logits(loaded, tokens), expected, atol=1e-4)


@pytest.fixture
def edited(golden, tmp_path):
  """Copies the golden LoRA folder with other settings and tensors."""

  def edited(settings=(), tensors=()):
    folder = tmp_path / "edited"
    shutil.copytree(golden / "lora", folder)
    raw = json.loads((folder / peft.CONFIG).read_text()) | dict(settings)
    (folder / peft.CONFIG).write_text(json.dumps(raw))
    kept = {k: v for k, v in (_tensors(folder) | dict(tensors)).items()
            if v is not None}  # fmt: skip
    safetensors.numpy.save_file(kept, folder / peft.TENSORS)
    return folder

  return edited


_Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    ({"bias": "all"}, "bias 'all' is not supported"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' is not support"),
    ({"init_lora_weights": ["x"]}, "init_lora_weights .* is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
    ({"lora_bias": True}, "lora_bias=True is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
    ({"layers_to_transform": [1]}, "layers_to_transform=.* is not supported"),
    ({"use_from_the_future": True}, "use_from_the_future=True is not support"),
    (
      {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3}},
      r"rank_pattern differs between the layers of layers/attention/q: \[4, 3\]",
    ),
    (
      {"r": 3},
      r"q_proj\.lora_A\.weight has shape \(4, 32\), .* wants \(3, 32\)",
    ),
    ({"r": 99}, "rank"),
    ({"use_dora": True}, "lora_magnitude_vector is missing"),
    (
      {"target_modules": ["q_proj", "v_proj", "o_proj"]},
      r"layers\.0\.self_attn\.o_proj\.lora_A\.weight is missing",
    ),
    (
      {"target_modules": r".*\.(q_proj|v_proj|up_proj)"},
      r"layers\.0\.mlp\.up_proj\.lora_A\.weight is missing",
    ),
  ],
)
def test_settings_that_are_not_supported_are_named(
  base, edited, settings, message
):
  with pytest.raises(ValueError, match=message):
    peft.load_adapter(edited(settings), base, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "tensors, message",
  [
    (
      {_Q.format(1, "B"): None},
      r"layers\.1\.self_attn\.q_proj\.lora_B.* missing",
    ),
    (
      {_Q.format(0, "A"): None},
      r"layers\.0\.self_attn\.q_proj\.lora_A.* missing",
    ),
    (
      {_Q.format(2, "A"): np.zeros((4, 32))},
      r"no place for 1 of .*\.layers\.2\.",
    ),
    (
      {"base_model.model.lm_head.weight": np.zeros((64, 32))},
      r"no place for 1 of the tensors in .*: .*lm_head\.weight",
    ),
  ],
)
def test_every_tensor_must_have_its_place(base, edited, tensors, message):
  with pytest.raises(ValueError, match=message):
    peft.load_adapter(edited(tensors=tensors), base, rngs=nnx.Rngs(0))


def test_a_pickled_adapter_is_never_read(base, edited):
  folder = edited()
  (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
  with pytest.raises(ValueError, match="is a pickle"):
    peft.load_adapter(folder, base, rngs=nnx.Rngs(0))


class _Other(Adapter):
  name = "other"

  def __init__(self, base, *, rngs):
    self.base = base


def test_what_peft_cannot_express_is_refused(base, tmp_path):
  plain = lambda base, rngs: LoRA(base, rngs=rngs)
  dora = lambda base, rngs: LoRA(base, rngs=rngs, use_dora=True)
  for rules, message in (
    ({"q": plain, "v": dora}, "PEFT has one use_dora for all modules"),
    (
      {"q": plain, "v": _Other},
      "adapter other at layers/attention/v has no PEFT",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      peft.save_adapter(tmp_path / "x", adapt(base, rules, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="no adapter to export"):
    peft.save_adapter(tmp_path / "x", base)
  assert not list(tmp_path.iterdir())


def test_an_untied_head_can_be_adapted(base, logits, tmp_path):
  rules = {"head": lambda base, rngs: LoRA(base, rank=2, rngs=rngs)}
  model = _perturbed(adapt(base, rules, rngs=nnx.Rngs(0)))
  peft.save_adapter(tmp_path / "out", model)
  assert set(_tensors(tmp_path / "out")) == {
    f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"
  }
  loaded = peft.load_adapter(tmp_path / "out", base, rngs=nnx.Rngs(0))
  tokens = jnp.ones((1, 4), jnp.int32)
  np.testing.assert_array_equal(logits(loaded, tokens), logits(model, tokens))
