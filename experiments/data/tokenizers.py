"""Text to token ids and back: bytes, GGUF vocabularies and tokenizer.json."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from adaptax.experiments.weights import gguf

_NORMAL = 1  # The GGUF type of a token that is not special.


class Tokenizer(Protocol):
  """Encodes without special tokens; `bos_id` and `eos_id` frame a document.

  Either is None where the vocabulary frames documents without it. Equal
  fingerprints mean equal ids for every text.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """int32 ids (n,)."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids (n,) of each text, on all cores."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text, special tokens left out."""


class ByteTokenizer:
  """The UTF-8 bytes as ids 0-255, then begin (256) and end (257)."""

  vocab_size = 258
  bos_id: int | None = 256
  eos_id: int | None = 257
  fingerprint = "bytes"

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    content = bytes(int(i) for i in ids if i < 256)
    return content.decode("utf-8", errors="replace")


class SubwordTokenizer:
  """A vocabulary of the `tokenizers` library.

  Special tokens that are spelled out in a text are taken as such. Bytes that
  the vocabulary lacks are dropped, as the library does: SmolLM2 lacks those of
  six control characters and of characters from U+40000 to U+BFFFF.
  """

  def __init__(
    self,
    backend: Backend,
    *,
    bos_id: int | None,
    eos_id: int | None,
    fingerprint: str,
  ):
    # Stored settings of encoder models would cut documents silently.
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.vocab_size = max(backend.get_vocab().values()) + 1
    self.bos_id, self.eos_id = bos_id, eos_id
    self.fingerprint = fingerprint

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    return self._backend.decode([int(i) for i in ids])


def load_gguf(path: str | pathlib.Path) -> SubwordTokenizer:
  """The byte-level BPE inside a GGUF file of the SmolLM family.

  Raises:
    ValueError: the file's vocabulary is of another kind.
  """
  metadata = gguf.read_gguf(path).metadata
  kind = (
    metadata.get("tokenizer.ggml.model"),
    metadata.get("tokenizer.ggml.pre"),
  )
  if kind != ("gpt2", "smollm"):
    raise ValueError(
      f"{path} has the tokenizer {kind}; only ('gpt2', 'smollm') is read from"
      " GGUF, give a tokenizer.json for others"
    )
  tokens = metadata["tokenizer.ggml.tokens"]
  merges = metadata["tokenizer.ggml.merges"]
  types = metadata["tokenizer.ggml.token_type"]
  backend = _byte_level_bpe(tokens, merges)
  backend.add_special_tokens(
    [token for token, kind in zip(tokens, types) if kind != _NORMAL]
  )
  add_bos = metadata.get("tokenizer.ggml.add_bos_token", False)
  return SubwordTokenizer(
    backend,
    bos_id=metadata["tokenizer.ggml.bos_token_id"] if add_bos else None,
    eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
    fingerprint=_digest(json.dumps([tokens, merges, types]).encode()),
  )


def _byte_level_bpe(tokens: list[str], merges: list[str]) -> Backend:
  backend = Backend(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[(left, right) for left, right in map(str.split, merges)],
    )
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def load_json(path: str | pathlib.Path) -> SubwordTokenizer:
  """A Hugging Face tokenizer.json, with the configs that lie beside it.

  The begin token is the one that the file's own post-processor puts first;
  the end token is named by tokenizer_config.json or config.json.

  Raises:
    ValueError: the file is malformed.
  """
  path = pathlib.Path(path)
  content = path.read_bytes()
  try:
    backend = Backend.from_buffer(content)
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"{path} is not a tokenizer.json: {reason}") from None
  framing = backend.encode("").ids
  return SubwordTokenizer(
    backend,
    bos_id=framing[0] if framing else None,
    eos_id=_end_token(backend, path.parent),
    fingerprint=_digest(content),
  )


def _end_token(backend: Backend, folder: pathlib.Path) -> int | None:
  token = _read_config(folder / "tokenizer_config.json").get("eos_token")
  if isinstance(token, dict):
    token = token["content"]
  if token is not None:
    return backend.token_to_id(token)
  end = _read_config(folder / "config.json").get("eos_token_id")
  return end[0] if isinstance(end, list) else end


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
  except ValueError as error:
    raise ValueError(f"{path} is malformed: {error}") from None


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def load_tokenizer(
  name: str, model_path: str | pathlib.Path | None = None
) -> Tokenizer:
  """The tokenizer of a config: 'bytes', 'model' or a path.

  Args:
    name: 'model' means the vocabulary that comes with `model_path`. A path is
      that of a GGUF file, of a tokenizer.json or of a folder that holds one.
    model_path: where a pretrained model was loaded from, None without one.

  Raises:
    ValueError: 'model' without a pretrained model, or a malformed file.
    FileNotFoundError: no such file.
  """
  if name == "bytes":
    return ByteTokenizer()
  if name != "model":
    model_path = name
  elif model_path is None:
    raise ValueError(
      "tokenizer 'model' needs a pretrained model; use 'bytes' or a path"
    )
  path = pathlib.Path(model_path)
  if path.is_dir():
    path = path / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"no tokenizer at {path}; use 'bytes', 'model', or the path of a .gguf"
      " file, of a tokenizer.json or of a folder that holds one"
    )
  return load_gguf(path) if path.suffix == ".gguf" else load_json(path)
