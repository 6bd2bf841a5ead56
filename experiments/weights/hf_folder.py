"""Reads and writes the safetensors folders of Hugging Face transformers."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
import safetensors
import safetensors.numpy

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# What may lie beside our weights: configs, tokenizers, chat templates.
_COMPANIONS = (".json", ".jinja")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READABLE = ("F64", "F32", "F16", "BF16")
# `format` is what transformers asks for; `writer` marks what may be replaced.
_METADATA = {"format": "pt", "writer": "adaptax"}


@dataclasses.dataclass(frozen=True)
class FileTensor:
  """One tensor of a safetensors file, read when it is loaded."""

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]

  def load(self) -> np.ndarray:
    """The values as a new array of `shape` in the type of the file."""
    # Opened anew each time: pages of an open file count as resident memory.
    with safetensors.safe_open(self.path, "np") as file:
      return file.get_tensor(self.name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds no JSON object")
  return value


def read_tensors(path: pathlib.Path) -> dict[str, FileTensor]:
  """The tensors of one safetensors file; only its header is read.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a safetensors file, a truncated one, or quantised values.
  """
  refuse_pickle(path)
  if not path.is_file():
    raise FileNotFoundError(f"no weight file {path}")
  try:
    with safetensors.safe_open(path, "np") as file:
      views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
      for name, view in views.items():
        if view.get_dtype() not in _READABLE:
          raise ValueError(
            f"{path}: tensor {name} has type {view.get_dtype()}; readable"
            f" types are {', '.join(_READABLE)}"
          )
      return {
        name: FileTensor(path, name, tuple(view.get_shape()))
        for name, view in views.items()
      }
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is truncated or not a safetensors file: {error}"
    ) from None


def read_folder(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, FileTensor]]:
  """Reads config.json and the headers of one or many safetensors files."""
  raw = read_json(folder / CONFIG)
  tensors: dict[str, FileTensor] = {}
  for path in _weight_files(folder):
    tensors |= read_tensors(path)
  return raw, tensors


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  if (folder / INDEX).exists():
    listed = read_json(folder / INDEX).get("weight_map", {}).values()
    names = sorted({pathlib.Path(name).name for name in listed})
    return [folder / name for name in names]
  files = sorted(folder.glob("*.safetensors"))
  if not files:
    for path in sorted(folder.iterdir()):
      refuse_pickle(path)
    raise FileNotFoundError(f"{folder} has no safetensors file")
  return files


def refuse_pickle(path: pathlib.Path) -> None:
  if path.suffix in _PICKLED:
    raise ValueError(
      f"{path} is a pickle, which could run any code and is never read;"
      " convert it to safetensors"
    )


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  safetensors.numpy.save_file(tensors, path, _METADATA)


def write_shards(
  folder: pathlib.Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int = 2**31,
) -> None:
  """Writes tensors as model.safetensors, or as shards and an index.

  Memory holds one shard at a time, and what `tensors` makes of it.
  """
  shards, total = [], 0
  for number, shard in enumerate(_shards(tensors, shard_bytes)):
    write_tensors(folder / f"{number}.part", shard)
    shards.append(list(shard))
    total += sum(array.nbytes for array in shard.values())
  weight_map: dict[str, str] = {}
  for number, names in enumerate(shards):
    name = "model.safetensors"
    if len(shards) > 1:
      name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
    (folder / f"{number}.part").rename(folder / name)
    weight_map |= dict.fromkeys(names, name)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _shards(
  tensors: Iterable[tuple[str, np.ndarray]], limit: int
) -> Iterator[dict[str, np.ndarray]]:
  shard: dict[str, np.ndarray] = {}
  size = 0
  for name, array in tensors:
    if shard and size + array.nbytes > limit:
      yield shard
      shard, size = {}, 0
    shard[name] = array
    size += array.nbytes
  yield shard


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty folder that becomes `target` once the block succeeds.

  A crash or a full disk leaves `target` as it was.

  Raises:
    FileExistsError: `target` holds files that adaptax did not write.
  """
  check_target(target)
  partial = target.with_name(f".{target.name}.partial")
  previous = target.with_name(f".{target.name}.previous")
  shutil.rmtree(partial, ignore_errors=True)
  shutil.rmtree(previous, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    if target.exists():
      target.rename(previous)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  shutil.rmtree(previous, ignore_errors=True)


def check_target(folder: pathlib.Path) -> None:
  """Raises FileExistsError where a new folder would cost somebody's files."""
  if folder.exists() and not _replaceable(folder):
    raise FileExistsError(
      f"{folder} holds files that adaptax did not write; name another folder"
    )


def _replaceable(folder: pathlib.Path) -> bool:
  if not folder.is_dir():
    return False
  paths = list(folder.iterdir())
  weights = [path for path in paths if path.suffix == ".safetensors"]
  others = {path.suffix for path in paths} - {".safetensors", *_COMPANIONS}
  return not paths or bool(
    weights and not others and all(map(_marked, weights))
  )


def _marked(path: pathlib.Path) -> bool:
  try:
    with safetensors.safe_open(path, "np") as file:
      return (file.metadata() or {}).get("writer") == _METADATA["writer"]
  except safetensors.SafetensorError:
    return False
