"""Damaged folders are refused, finished ones replaced whole or not at all."""

import json

import numpy as np
import pytest
import safetensors.numpy

from adaptax.experiments.weights import hf_folder


def test_a_truncated_file_is_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  hf_folder.write_tensors(path, {"a": np.arange(6.0).reshape(2, 3)})
  whole = path.read_bytes()
  for length in (0, 4, 20, len(whole) - 1):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
      hf_folder.read_tensors(path)


def test_a_pickle_is_never_read(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  path = tmp_path / "pytorch_model.bin"
  path.write_bytes(b"\x80\x04N.")
  with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
    hf_folder.read_folder(tmp_path)
  renamed = path.rename(tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="truncated or not a safetensors"):
    hf_folder.read_tensors(renamed)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
    hf_folder.read_folder(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match="has no safetensors file"):
    hf_folder.read_folder(tmp_path)
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
  (tmp_path / hf_folder.INDEX).write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match=r"no weight file .*00001-of"):
    hf_folder.read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_json_that_is_no_object_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json (is not|holds no) JSON"):
    hf_folder.read_folder(tmp_path)


def test_shards_and_index_hold_every_tensor(tmp_path):
  tensors = {f"t{i}": np.full((5, 4), i, np.float32) for i in range(7)}
  hf_folder.write_shards(tmp_path, iter(tensors.items()), shard_bytes=170)
  (tmp_path / "config.json").write_text("{}")
  _, read = hf_folder.read_folder(tmp_path)
  assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
  for name, value in tensors.items():
    assert read[name].shape == (5, 4)
    np.testing.assert_array_equal(read[name].load(), value)


def _write(folder, value):
  with hf_folder.new_folder(folder) as partial:
    hf_folder.write_json(partial / "config.json", {"value": value})
    hf_folder.write_tensors(partial / "a.safetensors", {"a": np.ones(value)})


def test_a_folder_of_ours_is_replaced(tmp_path):
  _write(tmp_path / "out", 1)
  _write(tmp_path / "out", 2)
  assert hf_folder.read_json(tmp_path / "out" / "config.json") == {"value": 2}
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
  _write(tmp_path / "out", 1)
  with (
    pytest.raises(OSError, match="no space"),
    hf_folder.new_folder(tmp_path / "out") as partial,
  ):
    hf_folder.write_json(partial / "config.json", {"value": 2})
    raise OSError("no space left on device")
  assert hf_folder.read_json(tmp_path / "out" / "config.json") == {"value": 1}
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _foreign_text(folder):
  (folder / "README.md").write_text("mine")


def _foreign_tensors(folder):
  safetensors.numpy.save_file({"a": np.ones(1)}, folder / "x.safetensors")


def _foreign_json(folder):
  (folder / "a.safetensors").unlink()


@pytest.mark.parametrize(
  "add", [_foreign_text, _foreign_tensors, _foreign_json]
)
def test_a_folder_of_others_is_not_replaced(tmp_path, add):
  _write(tmp_path / "out", 1)
  add(tmp_path / "out")
  with pytest.raises(FileExistsError, match="that adaptax did not write"):
    _write(tmp_path / "out", 2)
  assert hf_folder.read_json(tmp_path / "out" / "config.json") == {"value": 1}
