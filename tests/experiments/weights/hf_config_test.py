"""config.json in the dialects of transformers 4 and 5, there and back."""

import dataclasses

import pytest

from adaptax.experiments.weights.hf_config import from_hf, to_hf
from adaptax.layers.decoder import DecoderConfig
from adaptax.layers.rope import RopeScaling

SIZES = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
LLAMA = {"model_type": "llama", **SIZES}
SCALING = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 2.0,
  "original_max_position_embeddings": 16,
}
BASE = DecoderConfig(64, 32, 48, 2, 4, 2)


def test_what_config_json_leaves_out_is_what_transformers_assumes():
  expected = DecoderConfig(64, 32, 48, 2, 4, 4, context=2048, norm_eps=1e-6)
  assert from_hf(LLAMA) == expected
  gemma = from_hf({"model_type": "gemma", **SIZES, "hidden_act": "gelu"})
  assert (gemma.tie_embeddings, gemma.activation) == (True, "gelu_tanh")
  assert from_hf({"model_type": "mistral", **SIZES}).sliding_window == 4096


def test_both_spellings_of_rope_are_read():
  old = from_hf(
    {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**SCALING, "type": "llama3"}}
  )
  new = from_hf({**LLAMA, "rope_parameters": {**SCALING, "rope_theta": 5e5}})
  assert old == new
  assert old.rope_theta == 5e5
  assert old.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 2.0, 16)


@pytest.mark.parametrize("full, window", [(0, 8), (2, None), (28, None)])
def test_the_window_of_qwen2_counts_from_max_window_layers(full, window):
  raw = {"model_type": "qwen2", **SIZES, "sliding_window": 8}
  assert from_hf(raw).sliding_window is None
  raw |= {"use_sliding_window": True, "max_window_layers": full}
  assert from_hf(raw).sliding_window == window
  with pytest.raises(ValueError, match="layers 1 to 1 only"):
    from_hf({**raw, "max_window_layers": 1})


@pytest.mark.parametrize(
  "change, kind",
  [
    ({}, "llama"),
    ({"head_dim": 16, "tie_embeddings": True}, "llama"),
    ({"qkv_bias": True, "out_bias": True, "mlp_bias": True}, "llama"),
    ({"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)}, "llama"),
    ({"rope_scaling": RopeScaling("linear", 2.0)}, "llama"),
    ({"sliding_window": 7}, "mistral"),
    ({"qkv_bias": True}, "qwen2"),
    ({"qkv_bias": True, "sliding_window": 7}, "qwen2"),
    ({"embed_scale": 32**0.5, "activation": "gelu_tanh"}, "gemma"),
  ],
)
def test_a_config_comes_back_from_transformers(change, kind):
  config = dataclasses.replace(BASE, **change)
  raw = to_hf(dataclasses.replace(config, param_dtype="bfloat16", remat="full"))
  assert raw["model_type"] == kind
  assert from_hf(raw) == config


@pytest.mark.parametrize(
  "change", [{"logit_softcap": 30.0}, {"mlp_bias": True, "qkv_bias": True}]
)
def test_a_config_that_transformers_lacks_is_refused(change):
  with pytest.raises(ValueError, match="none of llama, mistral, qwen2, gemma"):
    to_hf(dataclasses.replace(BASE, **change))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "lama"}, "unknown model_type 'lama': did you mean llama"),
    ({"hidden_act": "relu"}, "unknown hidden_act 'relu'"),
    (
      {"rope_scaling": {"type": "yarn", "factor": 2}},
      "unknown rope_type 'yarn'",
    ),
    ({"rope_scaling": {"type": "llama3"}}, "llama3 lacks factor, low_freq"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
  ],
)
def test_a_variant_that_is_not_read_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    from_hf({**LLAMA, **change})


def test_missing_sizes_are_named():
  raw = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
  with pytest.raises(ValueError, match=r"config\.json lacks hidden_size"):
    from_hf(raw)
