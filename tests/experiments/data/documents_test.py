"""Tokenised documents: framing, loss flags, splits and hold-out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptax.experiments.data import ByteTokenizer, Corpus, documents
from adaptax.experiments.data.sources import Document, Segment

_BOS, _EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


class PlainTokenizer(ByteTokenizer):
  bos_id = eos_id = None


def _document(name, *segments):
  return Document(name, tuple(Segment(*segment) for segment in segments))


def _corpus(lengths):
  total = int(sum(lengths))
  return Corpus(
    tuple(f"document {i}" for i in range(len(lengths))),
    np.array(lengths),
    np.arange(total, dtype=np.int32),
    np.arange(total) % 3 > 0,
  )


class TestTokenize:
  def test_documents_are_framed_and_only_completions_learnt(self):
    corpus, _ = documents.tokenize(
      [
        _document("pair", ("ab", False), ("cd", True)),
        _document("text", ("e", True)),
      ],
      ByteTokenizer(),
    )
    pair, text = corpus[0], corpus[1]
    assert pair.tokens.tolist() == [_BOS, *b"abcd", _EOS]
    assert pair.loss.tolist() == [False] * 3 + [True] * 3
    assert text.tokens.tolist() == [_BOS, *b"e", _EOS]
    assert text.loss.tolist() == [False, True, True]
    assert (corpus.names, len(corpus)) == (("pair", "text"), 2)
    assert corpus.tokens.dtype == np.int32

  def test_nothing_is_added_without_begin_and_end(self):
    corpus, _ = documents.tokenize(
      [_document("a", ("xy", True))], PlainTokenizer()
    )
    assert corpus[0].tokens.tolist() == [*b"xy"]

  def test_more_documents_than_a_chunk_stay_in_order(self):
    texts = [str(i) for i in range(2500)]
    corpus, _ = documents.tokenize(
      (_document(text, (text, True)) for text in texts), PlainTokenizer()
    )
    decode = ByteTokenizer().decode
    assert [decode(corpus[i].tokens) for i in range(len(corpus))] == texts

  @pytest.mark.parametrize(
    "segments",
    [[("", True)], [(" \n\t", True)], [("prompt", False), ("", True)]],
  )
  def test_empty_documents_are_skipped_or_refused(self, segments):
    stream = [_document("void", *segments), _document("full", ("x", True))]
    corpus, skipped = documents.tokenize(stream, ByteTokenizer(), empty="skip")
    assert (corpus.names, skipped) == (("full",), 1)
    with pytest.raises(ValueError, match="document void is empty"):
      documents.tokenize(stream, ByteTokenizer(), empty="refuse")

  @pytest.mark.parametrize(("count", "empty"), [(0, "0"), (2, "2")])
  def test_no_documents_is_an_error(self, count, empty):
    stream = [_document("void", ("", True))] * count
    with pytest.raises(ValueError, match=f"no documents .*: {empty} are empty"):
      documents.tokenize(stream, ByteTokenizer())


class TestCorpus:
  @given(st.lists(st.integers(1, 50), min_size=1), st.integers(2, 20))
  def test_split_loses_nothing_and_fills_pieces(self, lengths, budget):
    corpus = _corpus(lengths)
    pieces = corpus.split(budget)
    expected = [
      (name, min(budget, length - start))
      for name, length in zip(corpus.names, lengths)
      for start in range(0, length, budget)
    ]
    assert list(zip(pieces.names, pieces.lengths)) == expected
    joined = [pieces[i] for i in range(len(pieces))]
    for field, whole in (("tokens", corpus.tokens), ("loss", corpus.loss)):
      parts = [getattr(piece, field) for piece in joined]
      assert np.array_equal(np.concatenate(parts), whole)

  @given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1))
  def test_select_keeps_whole_pieces(self, choices):
    corpus = _corpus([length for length, _ in choices])
    kept = [i for i, (_, keep) in enumerate(choices) if keep]
    part = corpus.select(np.array([keep for _, keep in choices]))
    assert part.names == tuple(corpus.names[i] for i in kept)
    for i, index in enumerate(kept):
      assert np.array_equal(part[i].tokens, corpus[index].tokens)
      assert np.array_equal(part[i].loss, corpus[index].loss)

  def test_fingerprints_see_tokens_loss_and_cuts(self):
    corpus = _corpus([5, 6])
    other = _corpus([5, 6])
    assert corpus.fingerprint == other.fingerprint
    loss = Corpus(corpus.names, corpus.lengths, corpus.tokens, ~corpus.loss)
    shifted = _corpus([6, 5])
    prints = {c.fingerprint for c in (corpus, loss, shifted, corpus.split(4))}
    assert len(prints) == 4

  @given(
    st.lists(st.lists(st.booleans(), min_size=1), min_size=1), st.integers(2, 9)
  )
  def test_what_teaches_nothing_is_left_out(self, flags, budget):
    loss = np.array([flag for document in flags for flag in document])
    tokens = np.arange(len(loss), dtype=np.int32)
    lengths = np.array([len(document) for document in flags])
    names = tuple(map(str, range(len(flags))))
    corpus = Corpus(names, lengths, tokens, loss)
    pieces = documents.with_targets(corpus.split(budget))
    expected = [
      document[start : start + budget]
      for document in flags
      for start in range(0, len(document), budget)
      if any(document[start + 1 : start + budget])
    ]
    assert [pieces[i].loss.tolist() for i in range(len(pieces))] == expected


class TestHoldOut:
  def test_takes_about_the_fraction_and_never_shares(self):
    corpus = _corpus([2] * 2000)
    train, held = documents.hold_out(corpus, 0.1)
    assert not set(train.names) & set(held.names)
    assert set(train.names) | set(held.names) == set(corpus.names)
    assert 150 < len(held) < 250

  def test_a_document_keeps_its_side(self):
    small, large = (documents.hold_out(_corpus([2] * n), 0.3) for n in (50, 90))
    assert set(small[0].names) <= set(large[0].names)
    assert set(small[1].names) <= set(large[1].names)

  def test_a_small_fraction_holds_one(self):
    train, held = documents.hold_out(_corpus([2] * 3), 1e-6)
    assert (len(train), len(held)) == (2, 1)

  def test_zero_holds_none(self):
    train, held = documents.hold_out(_corpus([2] * 3), 0)
    assert (len(train), len(held)) == (3, 0)

  @pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
  def test_a_wrong_fraction_is_an_error(self, fraction):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
      documents.hold_out(_corpus([2] * 3), fraction)

  def test_nothing_left_is_an_error(self):
    with pytest.raises(ValueError, match="leaves no document to train on"):
      documents.hold_out(_corpus([2]), 0.5)


def test_quantiles_are_lengths_that_occur():
  text = documents.describe(np.arange(1, 102) * 1000)
  assert text == (
    "p5 6,000, p25 26,000, p50 51,000, p75 76,000, p90 91,000, p95 96,000,"
    " p99 100,000, max 101,000"
  )
