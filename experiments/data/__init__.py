"""Text to packed batches: sources, tokenizers, packing, resumable order."""

import dataclasses
from collections.abc import Iterable

import grain

from adaptax.experiments.data import documents, pipeline
from adaptax.experiments.data.documents import Corpus, Piece
from adaptax.experiments.data.packing import Rows, pack
from adaptax.experiments.data.pipeline import Batch, GlobalBatches
from adaptax.experiments.data.sources import SOURCES
from adaptax.experiments.data.tokenizers import (
  ByteTokenizer,
  Tokenizer,
  load_tokenizer,
)
from adaptax.pallas_kernels.errors import unknown_name

__all__ = [
  "SOURCES",
  "Batch",
  "ByteTokenizer",
  "Corpus",
  "Data",
  "GlobalBatches",
  "Piece",
  "Rows",
  "Tokenizer",
  "load",
  "load_tokenizer",
  "pack",
]


@dataclasses.dataclass(frozen=True)
class Data:
  """Pieces of at most `tokens_per_row` tokens, to train on and held out.

  `summary` is text for a run's header; `held_out` is empty without a holdout.
  """

  train: Corpus
  held_out: Corpus
  tokens_per_row: int
  summary: str

  def train_batches(
    self, *, rows: int, micro_batches: int, seed: int, prefetch: int = 2
  ) -> grain.DatasetIterator[Batch]:
    """Endless (micro_batches, rows, T) batches; see `pipeline`."""
    return pipeline.train_batches(
      self.train,
      rows=rows,
      micro_batches=micro_batches,
      size=self.tokens_per_row,
      seed=seed,
      prefetch=prefetch,
    )

  def eval_batches(self, *, rows: int, limit: int | None = None) -> list[Batch]:
    """(rows, T) batches of the held-out windows, or the first `limit`."""
    return pipeline.eval_batches(
      self.held_out, rows=rows, size=self.tokens_per_row, limit=limit
    )


def load(
  *,
  name: str,
  tokenizer: Tokenizer,
  tokens_per_row: int,
  path: str = "",
  glob: str = "",
  holdout: float = 0.05,
  long_documents: str = "split",
  empty_documents: str = "skip",
) -> Data:
  """Reads, tokenises and splits a data set; all of it stays in memory.

  Args:
    name: a source of `SOURCES`: 'stdlib', 'text' or 'jsonl'.
    tokenizer: see `load_tokenizer`.
    tokens_per_row: T, the most tokens of a piece and the length of a row.
    path, glob: where the source looks; empty for its default.
    holdout: fraction of the documents that is held out, chosen by name.
    long_documents: 'split' those with more than T tokens, or 'refuse' them.
    empty_documents: 'skip' or 'refuse' them.

  Raises:
    ValueError: an argument, a file or a document is unfit; the message is one
      line that names it.
    FileNotFoundError: no such path, or no file matches.
  """
  _check("data.name", name, SOURCES)
  _check("data.long_documents", long_documents, ("split", "refuse"))
  _check("data.empty_documents", empty_documents, ("skip", "refuse"))
  if tokens_per_row < 2:
    raise ValueError(f"a row needs 2 tokens or more, got {tokens_per_row}")
  source = SOURCES[name](path, glob)
  corpus, skipped = documents.tokenize(
    source.documents, tokenizer, empty=empty_documents
  )
  if long_documents == "refuse":
    documents.refuse_longer(corpus, tokens_per_row)
  train, held_out = documents.hold_out(corpus, holdout)
  summary = (
    f"{source.description}: {len(train)} documents ({len(train.tokens):,}"
    f" tokens) to train on, {len(held_out)} ({len(held_out.tokens):,}) held"
    f" out\ntokens a document: {documents.describe(corpus.lengths)};"
    f" {(corpus.lengths > tokens_per_row).sum()} are longer than a row"
  )
  pieces = [part.split(tokens_per_row) for part in (train, held_out)]
  train, held_out = map(documents.with_targets, pieces)
  useless = sum(map(len, pieces)) - len(train) - len(held_out)
  if skipped or useless:
    summary += (
      f"\nleft out: {skipped} empty documents, {useless} pieces without a token"
      " to predict"
    )
  if not len(train):
    raise ValueError("no training document has a token to predict")
  return Data(train, held_out, tokens_per_row, summary)


def _check(key: str, value: str, allowed: Iterable[str]) -> None:
  if value not in allowed:
    raise unknown_name(key, value, allowed)
