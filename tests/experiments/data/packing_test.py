"""Properties of packed rows, checked token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptax.experiments.data import Piece, Rows, pack

_SIZE = 16


def _pieces(lengths, seed=0):
  """Pieces whose tokens are all different and never 0."""
  rng = np.random.default_rng(seed)
  tokens = 1 + np.arange(sum(lengths), dtype=np.int32)
  ends = np.cumsum(lengths)[:-1]
  loss = rng.integers(0, 2, len(tokens)).astype(bool)
  return [
    Piece(*parts) for parts in zip(np.split(tokens, ends), np.split(loss, ends))
  ]


@given(st.lists(st.integers(1, _SIZE), min_size=1, max_size=30))
def test_every_piece_lies_whole_in_one_row(lengths):
  pieces = _pieces(lengths)
  batch = pack(pieces, rows=len(lengths), size=_SIZE)
  used = np.zeros_like(batch["tokens"], bool)
  for tokens, loss in pieces:
    rows, columns = np.nonzero(np.isin(batch["tokens"], tokens))
    row, start, length = rows[0], columns[0], len(tokens)
    assert (rows == row).all()
    assert (columns == np.arange(start, start + length)).all()
    at = row, columns
    assert (batch["tokens"][at] == tokens).all()
    assert (batch["start"][at] == start).all()
    assert (batch["positions"][at] == np.arange(length)).all()
    assert (batch["targets"][at][:-1] == tokens[1:]).all()
    assert (batch["weights"][at][:-1] == loss[1:]).all()
    assert batch["weights"][at][-1] == 0
    used[at] = True
  own = np.broadcast_to(np.arange(_SIZE), used.shape)
  assert used.sum() == sum(lengths)
  assert (batch["start"][~used] == own[~used]).all()
  for name in ("tokens", "targets", "weights", "positions"):
    assert (batch[name][~used] == 0).all()


def test_dtypes_and_padding_of_an_empty_batch():
  batch = pack([], rows=2, size=3)
  dtypes = {name: array.dtype.name for name, array in batch.items()}
  assert dtypes.pop("weights") == "float32"
  assert set(dtypes) == {"tokens", "targets", "positions", "start"}
  assert set(dtypes.values()) == {"int32"}
  assert (batch["start"] == [[0, 1, 2], [0, 1, 2]]).all()


def test_no_room_is_an_error():
  with pytest.raises(ValueError, match="3 tokens finds no room in 1 rows of 4"):
    pack(_pieces([2, 3]), rows=1, size=4)


class TestRows:
  @given(
    st.integers(1, 5), st.lists(st.integers(1, _SIZE), min_size=1, max_size=40)
  )
  def test_agrees_with_a_plain_search(self, count, lengths):
    rows, gaps = Rows(count, _SIZE), [_SIZE] * count
    for length in lengths:
      fitting = [gap for gap in gaps if gap >= length]
      row = rows.add(length)
      assert (row is None) == (not fitting)
      if row is not None:
        assert gaps[row] == min(fitting)
        gaps[row] -= length
      assert rows.full == (max(gaps) == 0)
