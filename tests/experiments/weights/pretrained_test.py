"""Weights of others give their logits here, and ours load there."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from adaptax.experiments.weights import gguf, gguf_model
from adaptax.experiments.weights.pretrained import (
  Weights,
  fill,
  load_pretrained,
  save_pretrained,
)
from adaptax.layers.adapters import LoRA, adapt
from adaptax.layers.decoder import Decoder

MODELS = ("llama", "llama3_tied", "qwen2", "mistral", "gemma")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(golden, open_model, logits, name):
  recorded = np.load(golden / name / "recorded.npz")
  ours = logits(open_model(golden / name), recorded["tokens"])
  np.testing.assert_allclose(ours, recorded["logits"], rtol=0, atol=1e-4)


def test_smollm2_predicts_english_as_in_transformers(
  golden, open_model, logits
):
  try:
    gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))
  recorded = np.load(golden / "smollm2.npz")
  tokens = recorded["tokens"]
  log_probs = jax.nn.log_softmax(logits(open_model("smollm2"), tokens))
  losses = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], -1)
  assert 2 < losses.mean() < 3
  np.testing.assert_allclose(losses.mean(), recorded["loss"], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_folder_holds_the_same_tensors(
  golden, open_model, tmp_path, name
):
  save_pretrained(
    tmp_path / "out", open_model(golden / name), shard_bytes=30000
  )
  before, after = (_tensors(f) for f in (golden / name, tmp_path / "out"))
  assert before.keys() == after.keys()
  for key, value in before.items():
    # Gemma's offset is added and taken off again, which rounds once.
    atol = 1e-7 if name == "gemma" and "norm" in key else 0
    np.testing.assert_allclose(after[key], value, rtol=0, atol=atol)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  first, second = (
    load_pretrained(f)[0] for f in (golden / name, tmp_path / "out")
  )
  assert first == second


def _tensors(folder):
  tensors = {}
  for path in folder.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(path)
  return {k: v.astype(np.float32) for k, v in tensors.items()}


def test_export_keeps_bfloat16_and_extra_keys(golden, open_model, tmp_path):
  config, weights = load_pretrained(golden / "mistral", param_dtype="bfloat16")
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  fill(model, weights)
  save_pretrained(tmp_path / "out", model, extra={"eos_token_id": 7})
  before, after = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (golden / "mistral", tmp_path / "out")
  )
  for key, value in before.items():
    assert after[key].tobytes() == value.tobytes()
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert raw["eos_token_id"] == 7


def _as_gguf(folder, config, kind):
  """The tensors of a Hugging Face folder as llama.cpp's converter has them."""
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
  tensors = {}
  for name, array in _tensors(folder).items():
    for theirs, ours in _GGUF_NAMES:
      name = re.sub(theirs, ours, name)
    part = name.split(".")[2] if name.startswith("blk") else ""
    if kind == "llama" and part in heads:
      split = array.reshape(heads[part], 2, -1, *array.shape[1:])
      array = split.swapaxes(1, 2).reshape(array.shape)
    tensors[name] = _Array(array)
  return tensors


class _Array:
  def __init__(self, array):
    self.shape, self.load = array.shape, lambda: array


_GGUF_NAMES = (
  (r"model\.layers\.", "blk."),
  (r"model\.embed_tokens", "token_embd"),
  (r"model\.norm", "output_norm"),
  ("lm_head", "output"),
  (r"self_attn\.(.)_proj", r"attn_\1"),
  ("attn_o", "attn_output"),
  (r"mlp\.(.*)_proj", r"ffn_\1"),
  ("input_layernorm", "attn_norm"),
  ("post_attention_layernorm", "ffn_norm"),
)


def _metadata(kind, config):
  values = {
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.intermediate_size,
    "block_count": config.num_layers,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "context_length": config.context,
    "vocab_size": config.vocab_size,
    "attention.layer_norm_rms_epsilon": float(np.float32(config.norm_eps)),
  }
  named = {f"{kind}.{key}": value for key, value in values.items()}
  return {"general.architecture": kind, **named}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_model_is_that_of_its_huggingface_folder(golden, kind):
  config, expected = load_pretrained(golden / kind)
  file = gguf.GGUF(
    _metadata(kind, config), _as_gguf(golden / kind, config, kind)
  )
  assert gguf_model.from_gguf(file) == config
  tensors = gguf_model.half_split(file, config)
  weights = Weights(tensors, config, "gguf")
  assert weights.keys() == expected.keys()
  for path, value in weights.items():
    np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"general.architecture": "qwen"}, "unknown GGUF arch.*did you mean qwen2"),
    ({"llama.block_count": None}, r"metadata lacks llama\.block_count"),
    ({"llama.rope.scaling.type": "yarn"}, "unknown GGUF RoPE scaling 'yarn'"),
    ({"llama.rope.dimension_count": 4}, "rotates a part of each head"),
  ],
)
def test_gguf_models_that_are_not_read_are_named(golden, change, message):
  config, _ = load_pretrained(golden / "llama")
  file = gguf.GGUF(_metadata("llama", config) | change, {})
  with pytest.raises(ValueError, match=message):
    gguf_model.from_gguf(file)


@pytest.fixture
def copied(golden, tmp_path):
  """Copies a golden folder, its tensors in one file, changed by a function."""

  def copied(name="llama", change=lambda tensors: None):
    shutil.copytree(golden / name, tmp_path / name)
    tensors = _tensors(tmp_path / name)
    for path in tmp_path.glob("*/model*"):
      path.unlink()
    change(tensors)
    path = tmp_path / name / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return tmp_path / name

  return copied


def test_a_tensor_of_another_shape_is_named(copied):
  name = "model.layers.1.mlp.up_proj.weight"
  folder = copied(change=lambda t: t.update({name: np.zeros((3, 32))}))
  with pytest.raises(
    ValueError,
    match=rf"{name} has shape \(3, 32\), the config wants \(48, 32\)",
  ):
    load_pretrained(folder)


def test_a_missing_tensor_is_named(copied):
  folder = copied(change=lambda t: t.pop("model.norm.weight"))
  with pytest.raises(
    ValueError, match=r"tensor model\.norm\.weight is missing"
  ):
    load_pretrained(folder)


def test_tensors_left_over_are_named(copied):
  extra = {"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32))}
  folder = copied(change=lambda t: t.update(extra))
  with pytest.raises(
    ValueError, match=r"no place for 1 of .*layers\.2\.mlp\.up_proj"
  ):
    load_pretrained(folder)


def test_a_repeated_tied_head_is_no_surplus(copied, open_model):
  repeat = lambda t: t.update(
    {"lm_head.weight": t["model.embed_tokens.weight"].copy()}
  )
  assert not hasattr(open_model(copied("qwen2", repeat)), "head")


def test_quantised_integers_are_refused(copied):
  name = "model.norm.weight"
  folder = copied(change=lambda t: t.update({name: np.zeros(32, np.int8)}))
  with pytest.raises(ValueError, match=rf"{name} has type I8"):
    load_pretrained(folder)


def test_unmerged_leaves_are_not_exported(golden, open_model, tmp_path):
  rules = {"q": lambda base, rngs: LoRA(base, rngs=rngs)}
  model = adapt(open_model(golden / "llama"), rules, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"merge its adapters .*attention/q/a,"):
    save_pretrained(tmp_path / "out", model)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, message",
  [
    ("smolm2", "did you mean smollm2"),
    ("model.bin", "is a pickle"),
    ("model.pt", "is a pickle"),
  ],
)
def test_a_bad_name_is_refused(name, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    load_pretrained(name)
