"""Pretrained weights as our leaves, read one at a time.

No array exists before `fill` makes it:

  config, weights = load_pretrained("smollm2", param_dtype="bfloat16")
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  fill(model, weights)
"""

import dataclasses
import difflib
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptax.experiments.weights import gguf, hf_folder, names
from adaptax.experiments.weights.gguf_model import (
  Mapped,
  Tensor,
  from_gguf,
  half_split,
)
from adaptax.experiments.weights.hf_config import from_hf, norm_offset, to_hf
from adaptax.layers.decoder import DecoderConfig

NAMED = {"smollm2": gguf.smollm2_path}
# What Hugging Face calls them, for files that refer to their base.
HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


class Weights(Mapping[names.Path, np.ndarray]):
  """Arrays by path in our tree, each read from disk when it is asked for."""

  def __init__(
    self,
    tensors: Mapping[str, Tensor],
    config: DecoderConfig,
    scheme: names.Scheme,
  ):
    self._tensors, self._scheme = tensors, scheme
    self._leaves = names.leaves(config)
    self._check(config)

  def __len__(self) -> int:
    return len(self._leaves)

  def __iter__(self) -> Iterator[names.Path]:
    return iter(self._leaves)

  def __getitem__(self, path: names.Path) -> np.ndarray:
    leaf = self._leaves[path]
    stored = names.stored(path, leaf.shape, self._scheme)
    array = np.empty(leaf.shape, leaf.dtype)
    rows = array if stored.stacked else array[None]
    for row, name in zip(rows, stored.names):
      values = self._tensors[name].load()
      row[...] = values.T if stored.transposed else values
    return array

  def _check(self, config: DecoderConfig) -> None:
    left = dict(self._tensors)
    for path, leaf in self._leaves.items():
      stored = names.stored(path, leaf.shape, self._scheme)
      for name in stored.names:
        tensor = left.pop(name, None)
        if tensor is None:
          raise ValueError(_missing(name, left))
        if tensor.shape != stored.shape:
          raise ValueError(
            f"tensor {name} has shape {tensor.shape}, the config wants"
            f" {stored.shape}"
          )
    surplus = [name for name in left if not _redundant(name, config)]
    if surplus:
      raise ValueError(
        f"the model has no place for {len(surplus)} of the tensors:"
        f" {_some(surplus)}"
      )


def _missing(name: str, left: Mapping[str, Any]) -> str:
  close = difflib.get_close_matches(name, left, 1)
  hint = f" (left over: {close[0]})" if close else ""
  return f"tensor {name} is missing from the weights{hint}"


def _some(items: list[str]) -> str:
  return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _redundant(name: str, config: DecoderConfig) -> bool:
  # Old checkpoints repeat what is tied or computed.
  tied = config.tie_embeddings and name == "lm_head.weight"
  return tied or name.endswith(".rotary_emb.inv_freq")


def load_pretrained(
  name_or_path: str | pathlib.Path, **overrides: Any
) -> tuple[DecoderConfig, Weights]:
  """Opens weights; every tensor's presence and shape is checked at once.

  Args:
    name_or_path: a key of `NAMED`, a .gguf file, or a Hugging Face folder with
      config.json and safetensors.
    **overrides: fields of `DecoderConfig` that a run chooses, such as dtype,
      param_dtype (that of the arrays), remat.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, of another format or architecture, or its
      tensors do not fit its config.
  """
  path = resolve(name_or_path)
  if path.is_dir():
    return _load_folder(path, overrides)
  file = gguf.read_gguf(path)
  config = dataclasses.replace(from_gguf(file), **overrides)
  return config, Weights(half_split(file, config), config, "gguf")


def resolve(name_or_path: str | pathlib.Path) -> pathlib.Path:
  """The file or folder that `load_pretrained` would read."""
  if name_or_path in NAMED:
    return NAMED[str(name_or_path)]()
  path = pathlib.Path(name_or_path)
  hf_folder.refuse_pickle(path)
  if not path.exists():
    raise FileNotFoundError(_unknown(str(name_or_path)))
  return path


def _unknown(name: str) -> str:
  close = difflib.get_close_matches(name, NAMED, 1)
  hint = f": did you mean {close[0]}?" if close else ""
  return (
    f"no weights {name!r}{hint} (give a folder, a .gguf file, or one of"
    f" {', '.join(NAMED)})"
  )


def _load_folder(folder: pathlib.Path, overrides):
  raw, files = hf_folder.read_folder(folder)
  config = dataclasses.replace(from_hf(raw), **overrides)
  tensors: dict[str, Tensor] = dict(files)
  offset = norm_offset(raw)
  if offset:
    for name in tensors:
      if name.endswith("norm.weight"):
        tensors[name] = Mapped(files[name], lambda x: x + x.dtype.type(offset))
  return config, Weights(tensors, config, "huggingface")


def fill(
  model: nnx.Module,
  weights: Mapping[names.Path, np.ndarray],
  shardings: Mapping[names.Path, jax.sharding.Sharding] | None = None,
) -> None:
  """Gives a model, which may be abstract, its weights, one array at a time.

  Args:
    model: changed in place; its parameters are exactly those of `weights`.
    weights: arrays by path.
    shardings: where the arrays go, by path; None is the default device.
  """
  filled = []
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    array = weights[path].astype(leaf.dtype, copy=False)
    filled.append((path, leaf.replace(_place(array, path, shardings))))
  nnx.update(model, nnx.from_flat_state(filled))


def _place(array: np.ndarray, path, shardings) -> jax.Array:
  if shardings is None:
    return jax.device_put(array)
  return jax.make_array_from_callback(
    array.shape, shardings[path], lambda index: array[index]
  )


def save_pretrained(
  folder: str | pathlib.Path,
  model: Any,
  *,
  extra: Mapping[str, Any] | None = None,
  files: Iterable[pathlib.Path] = (),
  shard_bytes: int = 2**31,
) -> None:
  """Writes a decoder as a folder that transformers reads.

  Args:
    folder: made whole or not at all; one that adaptax wrote is replaced.
    model: a `Decoder` without adapters (see `adaptax.layers.adapters.merge`).
    extra: more of config.json, such as the ids of special tokens.
    files: copied into the folder, such as a tokenizer.json.
    shard_bytes: largest size of one safetensors file.

  Raises:
    FileExistsError: the folder holds files of others.
    ValueError: unmerged adapters, quantised weights, or a variant that no
      architecture of transformers has.
  """
  raw = to_hf(model.config)
  leaves = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  differing = leaves.keys() ^ names.leaves(model.config).keys()
  if differing:
    paths = sorted("/".join(map(str, path)) for path in differing)
    raise ValueError(
      "only a plain decoder is exported, merge its adapters first; it differs"
      f" in {_some(paths)}"
    )
  with hf_folder.new_folder(pathlib.Path(folder)) as partial:
    hf_folder.write_json(partial / hf_folder.CONFIG, {**(extra or {}), **raw})
    tensors = _named_tensors(leaves, norm_offset(raw))
    hf_folder.write_shards(partial, tensors, shard_bytes)
    for path in files:
      shutil.copyfile(path, partial / path.name)


def _named_tensors(leaves, offset: float) -> Iterator[tuple[str, np.ndarray]]:
  for path, leaf in leaves.items():
    stored = names.stored(path, leaf.shape, "huggingface")
    array = np.asarray(leaf.get_value())
    if offset and path[-1] == "scale":
      array = array - array.dtype.type(offset)
    rows = array if stored.stacked else array[None]
    for row, name in zip(rows, stored.names):
      yield name, np.ascontiguousarray(row.T if stored.transposed else row)
