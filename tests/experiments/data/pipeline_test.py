"""Order, coverage and exact resumption of global batches."""

import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adaptax.experiments.data import Corpus, pipeline

_SIZE = 16


def _corpus(lengths):
  """Pieces that consist of their own index plus one, and so show up by it."""
  return Corpus(
    tuple(map(str, range(len(lengths)))),
    np.array(lengths),
    np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
    np.ones(sum(lengths), bool),
  )


@pytest.fixture(scope="module")
def corpus():
  """150 pieces, most of them longer than half a row, so that many wait."""
  rng = np.random.default_rng(0)
  return _corpus(np.clip(rng.normal(10, 4, 150).astype(int), 1, _SIZE))


def _iterate(corpus, *, rows=2, micro_batches=2, seed=3, prefetch=0):
  return pipeline.train_batches(
    corpus,
    rows=rows,
    micro_batches=micro_batches,
    size=_SIZE,
    seed=seed,
    prefetch=prefetch,
  )


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _shown(batches):
  """Indices of the pieces in the batches, with repeats."""
  shown = []
  for batch in batches:
    tokens, positions = batch.arrays["tokens"], batch.arrays["positions"]
    shown += (tokens[(tokens > 0) & (positions == 0)] - 1).tolist()
  return shown


def _assert_covered(corpus, shown, state):
  """Shown or waiting are all pieces of each whole epoch, then new ones."""
  epochs, rest = divmod(state["position"], len(corpus))
  counts = np.bincount(shown + state["pending"], minlength=len(corpus))
  assert sorted(counts) == [epochs] * (len(corpus) - rest) + [epochs + 1] * rest


def _assert_equal(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right):
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
      assert np.array_equal(array, other.arrays[name]), name
    assert np.array_equal(one.lengths, other.lengths)


class TestTraining:
  def test_arrays_and_lengths_agree(self, corpus):
    batch = next(_iterate(corpus, rows=3, micro_batches=4))
    assert {a.shape for a in batch.arrays.values()} == {(4, 3, _SIZE)}
    lengths = [corpus.lengths[index] for index in _shown([batch])]
    assert sorted(batch.lengths) == sorted(lengths)

  def test_every_piece_drawn_is_shown_or_waits(self, corpus):
    batches, shown = _iterate(corpus), []
    for _ in range(130):
      shown += _shown([next(batches)])
      _assert_covered(corpus, shown, batches.get_state())
    assert batches.get_state()["position"] > 2 * len(corpus)

  def test_epochs_have_orders_of_their_own(self):
    corpus = _corpus([_SIZE] * 20)
    batches = _iterate(corpus, rows=1, micro_batches=1)
    epochs = [_shown(_take(batches, 20)) for _ in range(3)]
    for epoch in epochs:
      assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

  def test_no_piece_waits_forever(self, corpus):
    batches, ages, longest = _iterate(corpus), {}, 0
    for _ in range(200):
      next(batches)
      pending = batches.get_state()["pending"]
      ages = {index: ages.get(index, 0) + 1 for index in pending}
      longest = max([longest, *ages.values()])
    assert 1 < longest <= 64

  def test_rows_are_nearly_full(self):
    lengths = np.random.default_rng(0).geometric(0.3, 500).clip(max=_SIZE)
    batches = _take(_iterate(_corpus(lengths), rows=1), 200)
    used = sum(batch.lengths.sum() for batch in batches)
    assert used > 0.99 * 200 * 2 * _SIZE

  def test_seeds_give_other_orders(self, corpus):
    one, other = (next(_iterate(corpus, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one.arrays["tokens"], other.arrays["tokens"])

  def test_a_single_piece_repeats(self):
    batches = _iterate(_corpus([5]), rows=1, micro_batches=1)
    assert [b.lengths.tolist() for b in _take(batches, 2)] == [[5, 5, 5]] * 2

  def test_a_piece_longer_than_a_row_is_an_error(self):
    with pytest.raises(ValueError, match="no room for 17 tokens"):
      next(_iterate(_corpus([17])))


class TestResume:
  @pytest.mark.parametrize("prefetch", [1, 4])
  def test_prefetching_changes_nothing(self, corpus, prefetch):
    batches = _iterate(corpus, prefetch=prefetch)
    _assert_equal(_take(batches, 60), _take(_iterate(corpus), 60))
    batches.close()

  @pytest.mark.parametrize("prefetch", [0, 3])
  def test_resumes_bit_for_bit_from_every_step(self, corpus, prefetch):
    batches, other = (_iterate(corpus, prefetch=prefetch) for _ in range(2))
    states, expected = [], []
    for _ in range(90):
      states.append(json.dumps(batches.get_state()))
      expected.append(next(batches))
    for step in range(88):
      other.set_state(json.loads(states[step]))
      _assert_equal(_take(other, 2), expected[step : step + 2])
    # The steps reach into the third epoch, with pieces that wait.
    last = json.loads(states[-1])
    assert last["position"] > 2 * len(corpus)
    assert last["pending"]
    batches.close()
    other.close()

  def test_another_batch_size_goes_on_from_the_same_position(self, corpus):
    small = _iterate(corpus, micro_batches=1)
    large = _iterate(corpus, rows=4, micro_batches=6)
    shown = _shown(_take(small, 5))
    large.set_state(small.get_state())
    shown += _shown(_take(large, 2))
    _assert_covered(corpus, shown, large.get_state())

  def test_other_data_is_refused(self, corpus):
    state = _iterate(corpus).get_state()
    with pytest.raises(ValueError, match="position is in other data"):
      _iterate(_corpus([3, 4])).set_state(state)

  def test_orbax_saves_and_restores_it(self, corpus, tmp_path):
    batches, other = (_iterate(corpus, prefetch=2) for _ in range(2))
    _take(batches, 45)
    with ocp.CheckpointManager(tmp_path) as manager:
      save = grain.checkpoint.CheckpointSave(batches)
      manager.save(45, args=ocp.args.Composite(data=save))
      expected = _take(batches, 5)
      manager.wait_until_finished()
      restore = grain.checkpoint.CheckpointRestore(other)
      manager.restore(45, args=ocp.args.Composite(data=restore))
    _assert_equal(_take(other, 5), expected)
    batches.close()
    other.close()


class TestEvaluation:
  def _windows(self, batches):
    """Rows that hold something, of all the batches."""
    rows = np.concatenate([batch.arrays["tokens"] for batch in batches])
    return rows[rows.any(axis=1)].tolist()

  @pytest.mark.parametrize("rows", [1, 4, 64])
  def test_every_piece_is_shown_once(self, corpus, rows):
    batches = pipeline.eval_batches(corpus, rows=rows, size=_SIZE)
    assert sorted(_shown(batches)) == list(range(len(corpus)))
    for batch in batches:
      assert {a.shape for a in batch.arrays.values()} == {(rows, _SIZE)}
    total = sum(int(batch.arrays["weights"].sum()) for batch in batches)
    assert total == (corpus.lengths - 1).sum()

  @pytest.mark.parametrize("limit", [None, 5])
  def test_windows_do_not_depend_on_the_rows(self, corpus, limit):
    one, many = (
      pipeline.eval_batches(corpus, rows=rows, size=_SIZE, limit=limit)
      for rows in (1, 8)
    )
    assert self._windows(one) == self._windows(many)
    assert limit is None or len(self._windows(many)) == limit

  def test_nothing_held_out_gives_no_batches(self):
    assert pipeline.eval_batches(_corpus([]), rows=2, size=_SIZE) == []
