"""Packs whole documents into rows of a fixed number of tokens.

Pure NumPy on the host; how full rows get is decided by who calls `Rows.add` in
which order, see `pipeline`.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from adaptax.experiments.data.documents import Piece


class Rows:
  """Rows of `size` tokens, filled by best fit: the tightest row that has room.

  Best fit keeps wide gaps for long pieces (Johnson et al., Worst-case
  performance bounds for simple one-dimensional packing algorithms, 1974).
  """

  def __init__(self, count: int, size: int):
    self._gaps = [(size, row) for row in range(count)]

  def add(self, length: int) -> int | None:
    """Row that the piece goes to, or None where no row has room."""
    index = bisect.bisect_left(self._gaps, (length, -1))
    if index == len(self._gaps):
      return None
    gap, row = self._gaps.pop(index)
    bisect.insort(self._gaps, (gap - length, row))
    return row

  @property
  def full(self) -> bool:
    return self._gaps[-1][0] == 0


def pack(
  pieces: Sequence[Piece], *, rows: int, size: int
) -> dict[str, np.ndarray]:
  """Lays pieces out in (rows, size) arrays, each piece whole in one row.

  Returns:
    tokens, targets, positions, start int32 and weights float32. `targets` are
    the next tokens of the same piece; `weights` are 1 where that token is
    learnt, 0 at the last token of a piece and on padding. `positions` restart
    in each piece, `start` is where it begins in its row; a padding token is a
    piece of its own.

  Raises:
    ValueError: a piece finds no room.
  """
  names = "tokens", "targets", "positions"
  batch = {name: np.zeros((rows, size), np.int32) for name in names}
  batch["start"] = np.tile(np.arange(size, dtype=np.int32), (rows, 1))
  batch["weights"] = np.zeros((rows, size), np.float32)
  room, ends = Rows(rows, size), [0] * rows
  for tokens, loss in pieces:
    row = room.add(len(tokens))
    if row is None:
      raise ValueError(
        f"a piece of {len(tokens)} tokens finds no room in {rows} rows of"
        f" {size}"
      )
    start, ends[row] = ends[row], ends[row] + len(tokens)
    span, head = slice(start, ends[row]), slice(start, ends[row] - 1)
    batch["tokens"][row, span] = tokens
    batch["targets"][row, head] = tokens[1:]
    batch["weights"][row, head] = loss[1:]
    batch["positions"][row, span] = np.arange(len(tokens))
    batch["start"][row, span] = start
  return batch
