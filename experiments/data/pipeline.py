"""Endless, shuffled, resumable global batches, and fixed ones to evaluate.

Two stages: `GlobalBatches` chooses the documents of a step, with their lengths
known, and `pack` lays them out. A planner replaces the second one, and gives
the first a `Room` that admits what it can place.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from adaptax.experiments.data.documents import Corpus, Piece
from adaptax.experiments.data.packing import Rows, pack

# Pieces that may wait for a later batch. On the standard library 64 keep rows
# 99% full at 1 to 256 rows of 256 to 16,384 tokens; 1 gave 80% in places.
_LOOKAHEAD = 64


class Batch(NamedTuple):
  """The arrays of `packing.pack` and the lengths of the pieces in them."""

  arrays: dict[str, np.ndarray]
  lengths: np.ndarray


class Room(Protocol):
  """Decides which pieces fit into one global batch."""

  @property
  def full(self) -> bool:
    """Whether no piece fits any more."""

  def add(self, length: int) -> object | None:
    """Takes a piece of that many tokens, or returns None."""


class GlobalBatches(grain.IterDataset[list[Piece]]):
  """Groups pieces into global batches, as much as `room()` admits in each.

  Every epoch draws all pieces in an order of its own. A piece that finds no
  room waits for the next batch, where it goes first; one that an empty room
  refuses is an error.

  Args:
    corpus: the pieces; the batches are lists of them.
    room: makes the empty room of one batch.
    seed: of the order, 0 to 2**32 - 1.
    epochs: None for endless ones.
  """

  def __init__(
    self,
    corpus: Corpus,
    room: Callable[[], Room],
    *,
    seed: int,
    epochs: int | None = None,
  ):
    super().__init__()
    self.corpus, self.room = corpus, room
    self.seed, self.epochs = seed, epochs

  def __iter__(self) -> grain.DatasetIterator[list[Piece]]:
    return _GlobalBatchIterator(self)


class _GlobalBatchIterator(grain.DatasetIterator[list[Piece]]):
  """Its state holds indices only, and so fits a room of another size."""

  def __init__(self, batches: GlobalBatches):
    super().__init__()
    self._corpus, self._room = batches.corpus, batches.room
    self._seed, self._epochs = batches.seed, batches.epochs
    self._order = functools.lru_cache(maxsize=1)(self._permutation)
    self._position = 0
    self._pending: list[int] = []

  def _permutation(self, epoch: int) -> np.ndarray:
    # Of NumPy's generators the one whose stream is frozen across versions.
    random = np.random.RandomState([self._seed, epoch])
    return random.permutation(len(self._corpus))

  def _draw(self) -> Iterator[int]:
    count = len(self._corpus)
    while self._epochs is None or self._position < self._epochs * count:
      epoch, place = divmod(self._position, count)
      self._position += 1
      yield int(self._order(epoch)[place])

  def __next__(self) -> list[Piece]:
    pending = iter(self._pending)
    room, chosen, waiting = self._room(), [], []
    for index in itertools.chain(pending, self._draw()):
      length = int(self._corpus.lengths[index])
      if room.add(length) is not None:
        chosen.append(index)
      elif chosen:
        waiting.append(index)
      else:
        raise ValueError(f"no room for {length} tokens in an empty batch")
      if room.full or len(waiting) >= _LOOKAHEAD:
        break
    self._pending = [*waiting, *pending]
    if not chosen:
      raise StopIteration
    return [self._corpus[index] for index in chosen]

  def get_state(self) -> dict[str, Any]:
    return {
      "position": self._position,
      "pending": list(self._pending),
      "corpus": self._corpus.fingerprint,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    if state["corpus"] != self._corpus.fingerprint:
      raise ValueError(
        f"the saved position is in other data ({state['corpus']}, now"
        f" {self._corpus.fingerprint}): texts, tokenizer or row size changed"
      )
    self._position = state["position"]
    self._pending = list(state["pending"])


def train_batches(
  corpus: Corpus,
  *,
  rows: int,
  micro_batches: int,
  size: int,
  seed: int,
  prefetch: int = 2,
) -> grain.DatasetIterator[Batch]:
  """Endless epochs, each in its own order.

  Every process that asks for it gets the same global batch. `get_state` gives
  JSON data that `set_state` resumes from bit for bit, also with another
  number of rows or micro-batches.

  Args:
    rows, size: of a micro-batch; arrays are (micro_batches, rows, size).
    seed: 0 to 2**32 - 1.
    prefetch: batches that a thread prepares ahead; 0 for no thread.
  """
  total = rows * micro_batches

  def layout(pieces: list[Piece]) -> Batch:
    flat = pack(pieces, rows=total, size=size)
    shape = micro_batches, rows, size
    arrays = {name: value.reshape(shape) for name, value in flat.items()}
    return Batch(arrays, _lengths(pieces))

  room = lambda: Rows(total, size)
  return endless(corpus, room, layout, seed=seed, prefetch=prefetch)


def endless(
  corpus: Corpus,
  room: Callable[[], Room],
  lay_out: Callable[[list[Piece]], Batch],
  *,
  seed: int,
  prefetch: int = 2,
) -> grain.DatasetIterator[Batch]:
  """Endless epochs of what fits `room()`, laid out ahead of time in a thread.

  `get_state` gives JSON data that `set_state` resumes from bit for bit.
  """
  chosen = GlobalBatches(corpus, room, seed=seed).map(lay_out)
  return iter(
    grain.experimental.ThreadPrefetchIterDataset(
      chosen, prefetch_buffer_size=prefetch
    )
  )


def eval_batches(
  corpus: Corpus, *, rows: int, size: int, limit: int | None = None
) -> list[Batch]:
  """One pass in a fixed shuffled order, as (rows, size) batches.

  Windows of `size` tokens are packed one by one, so that neither they nor the
  first `limit` of them depend on `rows`. The last batch is padded.
  """
  one_row = GlobalBatches(corpus, lambda: Rows(1, size), seed=0, epochs=1)
  windows = itertools.islice(one_row, limit)
  batches = []
  while group := list(itertools.islice(windows, rows)):
    parts = [pack(window, rows=1, size=size) for window in group]
    parts.append(pack([], rows=rows - len(group), size=size))
    arrays = {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    batches.append(Batch(arrays, _lengths(list(itertools.chain(*group)))))
  return batches


def _lengths(pieces: Sequence[Piece]) -> np.ndarray:
  return np.array([len(piece.tokens) for piece in pieces], np.int32)
