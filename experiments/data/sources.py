"""Where documents come from: each source yields named texts in fixed order."""

import json
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# 750 KB of generated help text would be a fifteenth of all the bytes.
_GENERATED = "pydoc_data/topics.py"
_KEYS = 'needs "text", or "prompt" and "completion"'


class Segment(NamedTuple):
  """A part of a document; without `loss` it is read but not learnt."""

  text: str
  loss: bool


class Document(NamedTuple):
  """One text; its name is unique and the same on every machine."""

  name: str
  segments: tuple[Segment, ...]


class Source(NamedTuple):
  """What the documents are, in a few words, and the documents."""

  description: str
  documents: Iterable[Document]


def standard_library(path: str = "", glob: str = "") -> Source:
  """The sources of this Python's standard library.

  Test packages and installed packages are left out, since distributions of
  Python differ in them, and so are empty files and the generated
  pydoc_data/topics.py.

  Raises:
    ValueError: a path or glob was given; `text` reads any folder.
  """
  if path or glob:
    raise ValueError(
      f"data source 'stdlib' takes no path or glob, got {path or glob!r}; use"
      " 'text' to read a folder"
    )
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = []
  for folder, subfolders, names in os.walk(root):
    # Pruned here, as installed packages can outnumber the library by far.
    subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
    found = (pathlib.Path(folder, name) for name in names)
    sources = (file for file in found if file.suffix == ".py")
    files += [file for file in sources if file.stat().st_size]
  files = [file for file in _sorted(root, files) if file != root / _GENERATED]
  version = platform.python_version()
  return Source(f"standard library of Python {version}", _read(root, files))


def text_files(path: str, glob: str = "") -> Source:
  """Every file under the folder `path` that matches `glob` (**/*.txt).

  Raises:
    FileNotFoundError: no such folder, or no file in it matches.
    ValueError: a file is not UTF-8; raised when its document is reached.
  """
  root = _folder(path)
  files = _find(root, glob or "**/*.txt")
  return Source(f"{len(files)} text files in {path}", _read(root, files))


def json_lines(path: str, glob: str = "") -> Source:
  """Lines of a .jsonl file, or of the files in a folder that match `glob`.

  A line is an object with "text", or with "prompt" and "completion"; then
  only the completion is learnt. Other keys are ignored, blank lines skipped.

  Raises:
    FileNotFoundError: no such file or folder, or no file in it matches.
    ValueError: a line is malformed; raised when its document is reached.
  """
  if pathlib.Path(path).is_file():
    files = [pathlib.Path(path)]
    root = files[0].parent
  else:
    root = _folder(path)
    files = _find(root, glob or "**/*.jsonl")
  return Source(f"JSON lines of {path}", _read_lines(root, files))


SOURCES: dict[str, Callable[..., Source]] = {
  "stdlib": standard_library,
  "text": text_files,
  "jsonl": json_lines,
}


def _folder(path: str) -> pathlib.Path:
  if not path:
    raise ValueError("data.path is empty; this data source needs one")
  root = pathlib.Path(path)
  if not root.exists():
    raise FileNotFoundError(f"data.path {path} does not exist")
  if not root.is_dir():
    raise NotADirectoryError(f"data.path {path} is not a folder")
  return root


def _find(root: pathlib.Path, glob: str) -> list[pathlib.Path]:
  try:
    files = [file for file in root.glob(glob) if file.is_file()]
  except NotImplementedError:
    raise ValueError(f"data.glob {glob!r} must be relative") from None
  if not files:
    raise FileNotFoundError(f"no file in {root} matches {glob!r}")
  return _sorted(root, files)


def _sorted(
  root: pathlib.Path, files: list[pathlib.Path]
) -> list[pathlib.Path]:
  """By relative path as text, which no platform orders differently."""
  return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _decode(content: bytes, where: str) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where} is not UTF-8 text: {error.reason} at byte {error.start}"
    ) from None


def _read(root: pathlib.Path, files: list[pathlib.Path]) -> Iterator[Document]:
  for file in files:
    name = file.relative_to(root).as_posix()
    text = _decode(file.read_bytes(), str(file))
    yield Document(name, (Segment(text, True),))


def _read_lines(
  root: pathlib.Path, files: list[pathlib.Path]
) -> Iterator[Document]:
  for file in files:
    name = file.relative_to(root).as_posix()
    with file.open("rb") as lines:
      for number, line in enumerate(lines, start=1):
        if line.strip():
          where = f"{file}:{number}"
          segments = _parse(_decode(line, where), where)
          yield Document(f"{name}:{number}", segments)


def _parse(line: str, where: str) -> tuple[Segment, ...]:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{where}: malformed JSON: {error.msg} at column {error.colno}"
    ) from None
  if not isinstance(record, dict):
    raise ValueError(f"{where}: {_KEYS}; got a {type(record).__name__}")
  pair = "prompt" in record and "completion" in record
  if pair == ("text" in record):
    raise ValueError(f"{where}: {_KEYS}; has the keys {sorted(record)}")
  if not pair:
    return (Segment(_string(record, "text", where), True),)
  return (
    Segment(_string(record, "prompt", where), False),
    Segment(_string(record, "completion", where), True),
  )


def _string(record: dict[str, Any], key: str, where: str) -> str:
  value = record[key]
  if not isinstance(value, str):
    raise ValueError(
      f'{where}: "{key}" must be a string; got {type(value).__name__}'
    )
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise ValueError(
      f'{where}: "{key}" holds half of a surrogate pair, which is no text'
    ) from None
  return value
