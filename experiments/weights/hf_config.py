"""Between `DecoderConfig` and the config.json of Hugging Face transformers."""

import dataclasses
from typing import Any

from adaptax.layers.decoder import DecoderConfig
from adaptax.layers.rope import RopeScaling
from adaptax.pallas_kernels.errors import unknown_name

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "intermediate_size": "intermediate_size",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
_OPTIONS = {
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "max_position_embeddings": "context",
  "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tie_embeddings",
}
# What transformers assumes where config.json is silent.
_SILENT: dict[str, Any] = {
  "head_dim": None,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
}
_SILENT_OF: dict[str, dict[str, Any]] = {
  "llama": {},
  "mistral": {"sliding_window": 4096},
  "qwen2": {},
  "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
}
_ACTIVATIONS = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position_embeddings": "original_context",
}


def from_hf(raw: dict[str, Any]) -> DecoderConfig:
  """Reads the config.json of a Llama, Mistral, Qwen2 or Gemma (1) model.

  Raises:
    ValueError: another architecture, a missing size, or a variant (such as
      YaRN scaling or quantised weights) that the decoder does not have.
  """
  kind = raw.get("model_type", "")
  if kind not in _SILENT_OF:
    raise unknown_name("model_type", kind, _SILENT_OF)
  missing = [key for key in _SIZES if key not in raw]
  if missing:
    raise ValueError(f"config.json lacks {', '.join(missing)}")
  heads = {"num_key_value_heads": raw["num_attention_heads"]}
  full = _SILENT | heads | _SILENT_OF[kind] | raw
  _refuse(full, "quantization_config", None)
  _refuse(full, "partial_rotary_factor", None, 1.0)
  return DecoderConfig(
    **{ours: full[theirs] for theirs, ours in (_SIZES | _OPTIONS).items()},
    **_rope(full),
    **_biases(kind, full),
    activation=_activation(kind, full["hidden_act"]),
    sliding_window=_window(kind, full),
    embed_scale=full["hidden_size"] ** 0.5 if kind == "gemma" else 1.0,
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """Returns a config.json from which transformers builds the same model.

  Raises:
    ValueError: if no architecture of transformers has this combination.
  """
  run_only: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(config)
    if field.name in ("dtype", "param_dtype", "remat", "scan_layers")
  }
  for kind in _SILENT_OF:
    raw = _describe(kind, config)
    if from_hf(raw) == dataclasses.replace(config, **run_only):
      return raw
  raise ValueError(
    f"none of {', '.join(_SILENT_OF)} of transformers describes {config}"
  )


def norm_offset(raw: dict[str, Any]) -> float:
  """What the model adds to its stored norm scales: 1 for Gemma, else 0."""
  return 1.0 if raw["model_type"] == "gemma" else 0.0


def _describe(kind: str, config: DecoderConfig) -> dict[str, Any]:
  names = _SIZES | _OPTIONS
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  scaling = None
  if config.rope_scaling is not None:
    scaling = {
      theirs: getattr(config.rope_scaling, ours)
      for theirs, ours in _ROPE_SCALING.items()
    }
    scaling["rope_type"] = config.rope_scaling.kind
  return {
    "architectures": [f"{kind.capitalize()}ForCausalLM"],
    "model_type": kind,
    **{theirs: getattr(config, ours) for theirs, ours in names.items()},
    "hidden_act": activations[config.activation],
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "attention_bias": config.out_bias,
    "mlp_bias": config.mlp_bias,
    "sliding_window": config.sliding_window,
    "use_sliding_window": config.sliding_window is not None,
    "max_window_layers": 0,
    "torch_dtype": config.param_dtype,
  }


def _refuse(raw: dict[str, Any], key: str, *allowed) -> None:
  if raw.get(key) not in allowed:
    raise ValueError(f"config.json has {key} {raw[key]!r}, which is not read")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
  # rope_parameters since transformers 5, the two other keys before.
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
  _refuse(rope, "partial_rotary_factor", None, 1.0)
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "default":
    return {"rope_theta": theta}
  keys = {"linear": ["factor"], "llama3": list(_ROPE_SCALING)}
  if kind not in keys:
    raise unknown_name("rope_type", kind, ["default", *keys])
  missing = [key for key in keys[kind] if key not in rope]
  if missing:
    raise ValueError(f"RoPE scaling {kind} lacks {', '.join(missing)}")
  values = {_ROPE_SCALING[key]: rope[key] for key in keys[kind]}
  return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, **values)}


def _activation(kind: str, name: str) -> str:
  # The first Gemma files say gelu and mean its tanh approximation.
  if kind == "gemma" and name == "gelu":
    return "gelu_tanh"
  if name not in _ACTIVATIONS:
    raise unknown_name("hidden_act", name, _ACTIVATIONS)
  return _ACTIVATIONS[name]


def _biases(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
  if kind == "qwen2":
    return {"qkv_bias": True}
  if kind == "mistral":
    return {}
  both = bool(raw.get("attention_bias"))
  mlp = kind == "llama" and bool(raw.get("mlp_bias"))
  return {"qkv_bias": both, "out_bias": both, "mlp_bias": mlp}


def _window(kind: str, raw: dict[str, Any]) -> int | None:
  if kind == "mistral":
    return raw["sliding_window"]
  if kind != "qwen2" or not raw.get("use_sliding_window"):
    return None
  layers, full = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
  if 0 < full < layers:
    raise ValueError(
      f"config.json slides the window of layers {full} to {layers - 1} only;"
      " all layers or none is read"
    )
  return raw["sliding_window"] if full == 0 else None
