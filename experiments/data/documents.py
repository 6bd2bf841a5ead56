"""Tokenised documents with known lengths: split, held out, described."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from adaptax.experiments.data.sources import Document
from adaptax.experiments.data.tokenizers import Tokenizer

_CHUNK = 32  # Documents encoded at once: an encoding is 100 times its text.


class Piece(NamedTuple):
  """A document or a part of one, (n,) tokens that attend to one another.

  tokens: int32 ids.
  loss: bool, False where the token is only read (a prompt's).
  """

  tokens: np.ndarray
  loss: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Pieces, one after another in flat arrays.

  names: of the document that each piece is from.
  lengths: int64 (pieces,) tokens.
  tokens, loss: int32 and bool (sum of lengths,).
  """

  names: tuple[str, ...]
  lengths: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum(self.lengths)

  def __getitem__(self, index: int) -> Piece:
    end = self._ends[index]
    span = slice(end - self.lengths[index], end)
    return Piece(self.tokens[span], self.loss[span])

  @functools.cached_property
  def fingerprint(self) -> str:
    """Equal for equal pieces in equal order."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (self.lengths, self.tokens, self.loss):
      digest.update(array.data)
    return digest.hexdigest()

  def select(self, keep: np.ndarray) -> "Corpus":
    """The pieces where `keep`, bool (pieces,), in the same order."""
    tokens = np.repeat(keep, self.lengths)
    return Corpus(
      tuple(itertools.compress(self.names, keep)),
      self.lengths[keep],
      self.tokens[tokens],
      self.loss[tokens],
    )

  def split(self, budget: int) -> "Corpus":
    """Cuts pieces longer than `budget` into full ones and a rest."""
    counts = -(-self.lengths // budget)
    lengths = np.full(counts.sum(), budget)
    lengths[np.cumsum(counts) - 1] = self.lengths - (counts - 1) * budget
    names = itertools.chain.from_iterable(
      itertools.repeat(name, count) for name, count in zip(self.names, counts)
    )
    return dataclasses.replace(self, names=tuple(names), lengths=lengths)


def with_targets(pieces: Corpus) -> Corpus:
  """The pieces that teach something.

  A piece of a long prompt, or of a single token, has no token to predict, and
  a batch of nothing else would have no loss.
  """
  starts = np.cumsum(pieces.lengths) - pieces.lengths
  targets = pieces.loss.copy()
  targets[starts] = False
  return pieces.select(np.logical_or.reduceat(targets, starts))


def hold_out(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
  """Splits documents by a hash of their names into training and held-out ones.

  A document stays on its side when others are added. At least one document is
  held out unless `fraction` is 0.

  Raises:
    ValueError: `fraction` is outside [0, 1) or leaves nothing to train on.
  """
  if not 0 <= fraction < 1:
    raise ValueError(f"data.holdout must be in [0, 1), got {fraction}")
  places = np.array([_place(name) for name in corpus.names])
  held = places < fraction
  if fraction:
    held[places.argmin()] = True
  if held.all():
    raise ValueError(
      f"data.holdout={fraction} leaves no document to train on, of"
      f" {len(corpus)}; use 0 or add documents"
    )
  return corpus.select(~held), corpus.select(held)


def _place(name: str) -> float:
  """Uniform in [0, 1), the same on every machine."""
  digest = hashlib.blake2b(name.encode("utf-8"), digest_size=4).digest()
  return int.from_bytes(digest, "big") / 2**32


def refuse_longer(corpus: Corpus, budget: int) -> None:
  """Raises ValueError, naming the longest document, if it is over `budget`."""
  longest = int(corpus.lengths.argmax())
  if corpus.lengths[longest] > budget:
    raise ValueError(
      f"document {corpus.names[longest]} has {corpus.lengths[longest]} tokens,"
      f" more than the {budget} of a row; set data.long_documents='split' or"
      " give rows more tokens"
    )


def describe(lengths: np.ndarray) -> str:
  """Quantiles of the documents' lengths, for a run's header."""
  levels = 5, 25, 50, 75, 90, 95, 99
  values = np.percentile(lengths, levels, method="lower")
  quantiles = [f"p{level} {value:,}" for level, value in zip(levels, values)]
  return ", ".join([*quantiles, f"max {lengths.max():,}"])


def tokenize(
  documents: Iterable[Document], tokenizer: Tokenizer, *, empty: str = "skip"
) -> tuple[Corpus, int]:
  """Encodes all documents, framed by the tokenizer's begin and end ids.

  Args:
    empty: what to do with a document that has nothing to learn: 'skip' or
      'refuse' it.

  Returns:
    The corpus and the number of documents skipped.

  Raises:
    ValueError: no document is left, or an empty one is refused.
  """
  names, pieces, skipped = [], [], 0
  stream = iter(documents)
  while chunk := list(itertools.islice(stream, _CHUNK)):
    texts = [
      segment.text for document in chunk for segment in document.segments
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    for document in chunk:
      parts = list(itertools.islice(encoded, len(document.segments)))
      if _has_content(document, parts):
        names.append(document.name)
        pieces.append(_frame(document, parts, tokenizer))
      elif empty == "refuse":
        raise ValueError(f"document {document.name} is empty")
      else:
        skipped += 1
  if not pieces:
    raise ValueError(f"no documents to learn from: {skipped} are empty")
  tokens, loss = zip(*pieces)
  corpus = Corpus(
    tuple(names),
    np.array([len(piece) for piece in tokens]),
    np.concatenate(tokens),
    np.concatenate(loss),
  )
  return corpus, skipped


def _has_content(document: Document, parts: Sequence[np.ndarray]) -> bool:
  return any(
    segment.loss and len(part) and not segment.text.isspace()
    for segment, part in zip(document.segments, parts)
  )


def _frame(
  document: Document, parts: Sequence[np.ndarray], tokenizer: Tokenizer
) -> Piece:
  loss = [
    np.full(len(part), segment.loss)
    for segment, part in zip(document.segments, parts)
  ]
  parts = list(parts)
  if tokenizer.bos_id is not None:
    parts.insert(0, np.array([tokenizer.bos_id], np.int32))
    loss.insert(0, np.array([False]))
  if tokenizer.eos_id is not None:
    parts.append(np.array([tokenizer.eos_id], np.int32))
    loss.append(np.array([True]))
  return Piece(np.concatenate(parts), np.concatenate(loss))
