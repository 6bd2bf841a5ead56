"""The public entry: from files on disk to batches, and its errors."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from adaptax.experiments import data

_T = 32


@pytest.fixture
def folder(tmp_path):
  for i in range(40):
    (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (1 + i % 7))
  return tmp_path


def _load(path, **arguments):
  arguments = {
    "name": "text",
    "tokenizer": data.ByteTokenizer(),
    "tokens_per_row": _T,
    **arguments,
  }
  return data.load(path=str(path), **arguments)


def _texts(arrays):
  """The text of every piece in (rows, T) arrays, by the contract of `start`."""
  decode, texts = data.ByteTokenizer().decode, []
  tokens = arrays["tokens"].reshape(-1, _T)
  starts = arrays["start"].reshape(-1, _T)
  for row, start in zip(tokens, starts):
    texts += [decode(row[start == at]) for at in np.unique(start)]
  return texts


class TestLoad:
  def test_held_out_text_is_never_trained_on(self, folder):
    loaded = _load(folder, holdout=0.3)
    held = set(loaded.held_out.names)
    assert held and not held & set(loaded.train.names)
    batches = loaded.eval_batches(rows=2)
    shown = "".join(t for b in batches for t in _texts(b.arrays))
    for name in held:
      assert f"document {int(name[:2])} " in shown
    batches = loaded.train_batches(rows=2, micro_batches=3, seed=0)
    texts = [t for _ in range(60) for t in _texts(next(batches).arrays)]
    batches.close()
    heads = {text.split()[1] for text in texts if text.count(" ") > 1}
    assert {f"{int(name[:2])}" for name in loaded.train.names} <= heads
    assert not {f"{int(name[:2])}" for name in held} & heads

  def test_the_summary_counts(self, folder):
    first, second = _load(folder, holdout=0.3).summary.splitlines()
    assert first.startswith(f"40 text files in {folder}: ")
    lengths = [len(f"document {i} ") * (1 + i % 7) + 2 for i in range(40)]
    assert f"max {max(lengths)}" in second
    assert f"; {sum(n > _T for n in lengths)} are longer than a row" in second

  def test_the_summary_counts_what_is_left_out(self, tmp_path):
    pairs = [("p" * 200, "c"), ("2+2=", "4"), ("p", ""), ("p", " ")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loaded = _load(tmp_path, name="jsonl", holdout=0)
    # 203 tokens with begin and end: 6 rows of the prompt alone, and the rest.
    assert loaded.summary.splitlines()[2:] == [
      "left out: 2 empty documents, 6 pieces without a token to predict"
    ]
    assert len(loaded.train) == 2

  def test_only_completions_carry_weight(self, tmp_path):
    pairs = [("question", "answer"), ("2+2=", "4")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    loaded = _load(tmp_path / "a.jsonl", name="jsonl", holdout=0)
    assert loaded.eval_batches(rows=1) == []
    arrays = next(
      loaded.train_batches(rows=1, micro_batches=1, seed=0, prefetch=0)
    ).arrays
    learnt = arrays["targets"][arrays["weights"] > 0].tolist()
    end = data.ByteTokenizer.eos_id
    assert learnt.count(end) >= 1
    content = bytes(token for token in learnt if token != end).decode()
    assert set(content) == set("answer4")

  def test_every_batch_has_something_to_learn(self, tmp_path):
    pair = {"prompt": "p" * 200, "completion": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(pair))
    loaded = _load(tmp_path, name="jsonl", holdout=0)
    batches = loaded.train_batches(rows=1, micro_batches=1, seed=0, prefetch=0)
    for _ in range(10):
      assert next(batches).arrays["weights"].sum() > 0

  def test_another_process_gets_the_same_batches(self, folder):
    script = (
      "import hashlib, sys; from adaptax.experiments import data\n"
      "d = data.load(name='text', path=sys.argv[1], tokens_per_row=32,"
      " tokenizer=data.ByteTokenizer())\n"
      "b = d.train_batches(rows=2, micro_batches=2, seed=7, prefetch=0)\n"
      "print(hashlib.sha256(b''.join(next(b).arrays['tokens'].tobytes()"
      " for _ in range(30))).hexdigest())"
    )
    output = subprocess.run(
      [sys.executable, "-c", script, str(folder)],
      env=os.environ | {"PYTHONHASHSEED": "5"},
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    batches = _load(folder).train_batches(rows=2, micro_batches=2, seed=7)
    taken = b"".join(
      next(batches).arrays["tokens"].tobytes() for _ in range(30)
    )
    batches.close()
    assert output.strip() == hashlib.sha256(taken).hexdigest()


class TestErrors:
  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      ({"name": "sdtlib"}, r"data\.name 'sdtlib': did you mean stdlib"),
      (
        {"long_documents": "cut"},
        r"data\.long_documents 'cut' \(allowed: split",
      ),
      ({"empty_documents": "skp"}, "did you mean skip"),
      ({"tokens_per_row": 1}, "a row needs 2 tokens or more, got 1"),
      ({"holdout": 1.0}, r"data\.holdout must be in"),
      ({"long_documents": "refuse"}, r"document 13\.txt has 86 tokens.* 32 of"),
      ({"glob": "*.md"}, r"matches '\*\.md'"),
      ({"glob": "/*.txt"}, r"data\.glob '/\*\.txt' must be relative"),
    ],
  )
  def test_names_the_value(self, folder, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
      _load(folder, **arguments)
    assert "\n" not in str(error.value)

  def test_empty_documents_can_be_refused(self, folder):
    (folder / "void.txt").touch()
    with pytest.raises(ValueError, match=r"document void\.txt is empty"):
      _load(folder, empty_documents="refuse")
