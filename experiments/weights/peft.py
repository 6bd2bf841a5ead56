"""LoRA, rsLoRA and DoRA adapters as the folders of Hugging Face PEFT.

A folder is adapter_config.json and adapter_model.safetensors, whose tensors
are base_model.model.<module>.lora_A.weight (rank, in), .lora_B.weight
(out, rank) and, for DoRA, .lora_magnitude_vector (out,).
"""

import collections
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptax.experiments.weights import hf_folder
from adaptax.experiments.weights.names import MODULES, Path
from adaptax.layers.adapters import LoRA, adapt, adapters

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_SUFFIXES = {
  "a": "lora_A.weight",
  "b": "lora_B.weight",
  "magnitude": "lora_magnitude_vector",
}
# Keys that change nothing for an adapter that is already trained.
_HARMLESS = {
  "auto_mapping", "base_model_name_or_path", "inference_mode",
  "megatron_core", "peft_version", "qalora_group_size", "revision",
  "runtime_config", "task_type",
}  # fmt: skip
_READ = {
  "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout",
  "peft_type", "r", "rank_pattern", "target_modules", "use_dora",
  "use_rslora",
}  # fmt: skip
# Only the first two say something about the base of a trained adapter.
_INITS = ("pissa", "olora", True, False, "gaussian", "orthogonal")


def save_adapter(
  folder: str | pathlib.Path, model: Any, base_model: str | None = None
) -> None:
  """Writes a model's adapters as a PEFT folder.

  After `init=pissa` or `olora` the adapter is rewritten as one of twice the
  rank on the original base, so that the folder needs no such base.

  Args:
    folder: made whole or not at all; one that adaptax wrote is replaced.
    model: a `Decoder` adapted with LoRA, its arrays whole on this host.
    base_model: name or path of the base model, for PEFT to find it.

  Raises:
    FileExistsError: the folder holds files of others.
    ValueError: no adapter, or one that PEFT's LoRA cannot express.
  """
  found = dict(_loras(model))
  config = _config(
    {path: lora for path, (lora, _) in found.items()}, base_model
  )
  tensors = dict(_tensors(found))
  with hf_folder.new_folder(pathlib.Path(folder)) as partial:
    hf_folder.write_json(partial / CONFIG, config)
    hf_folder.write_tensors(partial / TENSORS, tensors)


def _loras(model: Any) -> Iterator[tuple[Path, tuple[LoRA, int | None]]]:
  for path, adapter, size in adapters(model):
    # A subclass may compute something else with the same leaves.
    if type(adapter) is not LoRA:
      raise ValueError(
        f"adapter {adapter.name} at {path} has no PEFT export; export the"
        " merged model instead"
      )
    yield tuple(path.split("/")), (adapter, size)


def _config(
  found: Mapping[Path, LoRA], base_model: str | None
) -> dict[str, Any]:
  if not found:
    raise ValueError("the model has no adapter to export")
  plain = {_short(path): lora.to_plain() for path, lora in found.items()}
  ranks = {name: rank for name, (*_, rank) in plain.items()}
  alphas = {name: _number(alpha) for name, (*_, alpha, _) in plain.items()}
  rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "target_modules": sorted(plain),
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": {k: v for k, v in ranks.items() if v != rank},
    "alpha_pattern": {k: v for k, v in alphas.items() if v != alpha},
    "lora_dropout": _same(found, "dropout", lambda a: a.dropout.rate),
    "use_rslora": _same(found, "use_rslora", lambda a: a.use_rslora),
    "use_dora": _same(found, "use_dora", lambda a: a.magnitude is not None),
    # Anything else would make PEFT decompose the base again.
    "init_lora_weights": True,
    "bias": "none",
    "fan_in_fan_out": False,
  }


def _short(path: Path) -> str:
  return MODULES[path]["huggingface"].rpartition(".")[2]


def _number(value: float) -> float:
  return int(value) if value == int(value) else value


def _commonest(values: Iterable[Any]) -> Any:
  return collections.Counter(values).most_common(1)[0][0]


def _same(found: Mapping[Any, LoRA], field: str, get) -> Any:
  values = {get(adapter) for adapter in found.values()}
  if len(values) > 1:
    raise ValueError(
      f"PEFT has one {field} for all modules, the adapters have"
      f" {sorted(values)}"
    )
  return values.pop()


def _tensors(
  found: Mapping[Path, tuple[LoRA, int | None]],
) -> Iterator[tuple[str, np.ndarray]]:
  for path, (lora, size) in found.items():
    a, b, _, _ = lora.to_plain()
    leaves = {"a": a, "b": b}
    if lora.magnitude is not None:
      leaves["magnitude"] = lora.magnitude[...]
    for leaf, array in leaves.items():
      rows = np.asarray(array if size else array[None])
      for row, key in zip(rows, _keys(path, leaf, size)):
        yield key, np.ascontiguousarray(row.T)


def _keys(path: Path, leaf: str, size: int | None) -> list[str]:
  """The tensor names of a leaf, one a layer."""
  return [
    f"base_model.model.{module}.{_SUFFIXES[leaf]}"
    for module in _modules(path, size)
  ]


def _modules(path: Path, size: int | None) -> list[str]:
  template = MODULES[path]["huggingface"]
  return [template.format(layer) for layer in range(size or 1)]


def load_adapter(
  folder: str | pathlib.Path, model: Any, *, rngs: nnx.Rngs
) -> Any:
  """Returns the model adapted as a PEFT folder says.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    model: a `Decoder` with the weights of the adapter's base model.
    rngs: streams `params` and, for dropout, `dropout`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: another method than LoRA, a setting that is not supported, or
      tensors that do not fit the model.
  """
  folder = pathlib.Path(folder)
  raw = hf_folder.read_json(folder / CONFIG)
  _check(raw)
  if (folder / "adapter_model.bin").exists() and not (
    folder / TENSORS
  ).exists():
    hf_folder.refuse_pickle(folder / "adapter_model.bin")
  tensors = hf_folder.read_tensors(folder / TENSORS)
  layers = model.config.num_layers
  rules = {}
  for path in MODULES:
    size = layers if path[0] == "layers" else None
    there = not tensors.keys().isdisjoint(_keys(path, "a", size))
    if there or _is_target(raw, path, size):
      rules["/".join(path)] = _factory(raw, path, size)
  model = adapt(model, rules, rngs=rngs)
  for path, (lora, size) in _loras(model):
    _fill(lora, path, size, tensors)
  if tensors:
    raise ValueError(
      f"the model has no place for {len(tensors)} of the tensors in {folder}:"
      f" {', '.join(list(tensors)[:3])}"
    )
  return model


def _check(raw: Mapping[str, Any]) -> None:
  kind = raw.get("peft_type")
  if kind != "LORA":
    raise ValueError(f"peft_type {kind!r} is not supported, only 'LORA' is")
  if raw.get("bias", "none") != "none":
    raise ValueError(f"PEFT bias {raw['bias']!r} is not supported, only 'none'")
  init = raw.get("init_lora_weights", True)
  if init not in _INITS:
    raise ValueError(
      f"init_lora_weights {init!r} is not supported, only"
      f" {', '.join(map(repr, _INITS))} are"
    )
  known = _HARMLESS | _READ
  for key, value in raw.items():
    # PEFT's switches are off while false or empty, those to come included.
    if key not in known and value:
      raise ValueError(f"PEFT setting {key}={value!r} is not supported")


def _is_target(raw: Mapping[str, Any], path: Path, size: int | None) -> bool:
  """Whether the config wants any of the modules adapted, as PEFT reads it."""
  targets = raw.get("target_modules") or ()
  if isinstance(targets, str):
    return any(re.fullmatch(targets, name) for name in _modules(path, size))
  ends = tuple(f".{target}" for target in targets)
  return any(f".{name}".endswith(ends) for name in _modules(path, size))


def _factory(raw: Mapping[str, Any], path: Path, size: int | None):
  init = raw.get("init_lora_weights", True)
  return functools.partial(
    LoRA,
    rank=_per_module(raw, "rank_pattern", raw.get("r", 8), path, size),
    alpha=_per_module(
      raw, "alpha_pattern", raw.get("lora_alpha", 8), path, size
    ),
    use_rslora=raw.get("use_rslora", False),
    use_dora=raw.get("use_dora", False),
    dropout=raw.get("lora_dropout", 0.0),
    init=init if init in _INITS[:2] else "kaiming",
  )


def _per_module(raw, key: str, default, path: Path, size: int | None) -> Any:
  values = [default] * (size or 1)
  for layer, module in enumerate(_modules(path, size)):
    for pattern, value in (raw.get(key) or {}).items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        values[layer] = value
        break
  if len(set(values)) > 1:
    raise ValueError(
      f"{key} differs between the layers of {'/'.join(path)}: {values}; one"
      " value for all layers is supported"
    )
  return values[0]


def _fill(lora: LoRA, path: Path, size: int | None, tensors) -> None:
  """Moves tensors into the leaves of one, perhaps stacked, adapter."""
  for leaf in _SUFFIXES:
    variable = getattr(lora, leaf)
    if variable is None:
      continue
    wanted = variable.shape[1 if size else 0 :][::-1]
    rows = []
    for key in _keys(path, leaf, size):
      tensor = tensors.pop(key, None)
      if tensor is None:
        raise ValueError(f"tensor {key} is missing from the adapter")
      if tensor.shape != wanted:
        raise ValueError(
          f"tensor {key} has shape {tensor.shape}, the config wants {wanted}"
        )
      rows.append(tensor.load().T)
    array = np.stack(rows) if size else rows[0]
    variable.set_value(jnp.asarray(array, variable.dtype))
