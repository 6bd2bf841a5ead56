"""Documents that each source yields, and the errors that name bad input."""

import argparse
import json
import pathlib
import platform

import pytest

from adaptax.experiments.data.sources import SOURCES


def _texts(source):
  return {
    document.name: [tuple(segment) for segment in document.segments]
    for document in source.documents
  }


class TestStandardLibrary:
  def test_reads_it_without_tests_and_generated_text(self):
    source = SOURCES["stdlib"]()
    documents = list(source.documents)
    names = [document.name for document in documents]
    assert platform.python_version() in source.description
    assert names == sorted(names) and len(set(names)) == len(names) > 400
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages"}
    assert "pydoc_data/topics.py" not in names
    text = documents[names.index("argparse.py")].segments[0].text
    assert text.encode() == pathlib.Path(argparse.__file__).read_bytes()

  def test_takes_no_path(self):
    with pytest.raises(ValueError, match="takes no path"):
      SOURCES["stdlib"]("somewhere")


class TestTextFiles:
  def test_order_and_names_are_relative(self, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"one\r\n")
    (tmp_path / "a.txt").write_text("zwei ä", encoding="utf-8")
    (tmp_path / "note.md").write_text("left out")
    texts = _texts(SOURCES["text"](str(tmp_path)))
    assert list(texts.items()) == [
      ("a.txt", [("zwei ä", True)]),
      ("b/z.txt", [("one\r\n", True)]),
    ]
    assert list(_texts(SOURCES["text"](str(tmp_path), "*.md"))) == ["note.md"]

  def test_no_match_names_folder_and_pattern(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"matches '\*\*/\*\.txt'"):
      SOURCES["text"](str(tmp_path))

  def test_a_file_that_is_not_text_is_named(self, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 .* byte 3"):
      list(SOURCES["text"](str(tmp_path)).documents)


class TestJsonLines:
  def test_text_and_pairs(self, tmp_path):
    lines = [
      {"text": "alone", "id": 3},
      {"prompt": "2+2=", "completion": "4"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    expected = {
      "a.jsonl:1": [("alone", True)],
      "a.jsonl:3": [("2+2=", False), ("4", True)],
    }
    assert _texts(SOURCES["jsonl"](str(path))) == expected
    assert _texts(SOURCES["jsonl"](str(tmp_path))) == expected

  @pytest.mark.parametrize(
    ("line", "message"),
    [
      (b'{"text": "a', "malformed JSON"),
      (b'["text"]', "got a list"),
      (b'{"txt": "a"}', r"has the keys \['txt'\]"),
      (b'{"prompt": "a"}', r"has the keys \['prompt'\]"),
      (b'{"text": "a", "prompt": "b", "completion": "c"}', "has the keys"),
      (b'{"text": 3}', '"text" must be a string; got int'),
      (b'{"prompt": "a", "completion": null}', '"completion" must be'),
      (b'{"text": "\\ud800"}', "surrogate"),
      (b'{"text": "\xff"}', "not UTF-8"),
    ],
  )
  def test_a_bad_line_is_named(self, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:2.*{message}") as error:
      list(SOURCES["jsonl"](str(path)).documents)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["text", "jsonl"])
class TestFolders:
  def test_a_missing_path_is_named(self, name, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
      SOURCES[name](str(tmp_path / "gone"))

  def test_an_empty_path_is_an_error(self, name):
    with pytest.raises(ValueError, match=r"data\.path is empty"):
      SOURCES[name]("")


def test_a_file_is_no_folder(tmp_path):
  path = tmp_path / "a.txt"
  path.touch()
  with pytest.raises(NotADirectoryError, match=r"a\.txt is not a folder"):
    SOURCES["text"](str(path))
