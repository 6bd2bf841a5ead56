import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptax.parallel.layout import Layout, exchange_limit

MIXED = dict(
  tokens=16,
  degree=(4, 4, 4, 4, 2, 2, 1, 1),
  documents=(3, 0, 2, 7),
  lengths=(50, 14, 20, 16),
  devices=(0, 0, 4, 6),
  offsets=(0, 50, 5, 0),
)


@st.composite
def layouts(draw, heads=None, ring=False):
  """Random layouts of 8 devices, their documents scattered with gaps."""
  tokens, degree = 2 * draw(st.integers(1, 8)), []
  while len(degree) < 8:
    room = 8 - len(degree)
    fits = [s for s in (1, 2, 4, 8) if s <= room and len(degree) % s == 0]
    size = draw(st.sampled_from(fits))
    degree += [size] * size
  devices, offsets, lengths = [], [], []
  leaders = [d for d in range(8) if d % degree[d] == 0]
  for device in leaders:
    room = degree[device] * tokens
    cuts = sorted(draw(st.sets(st.integers(0, room), max_size=6)))
    for begin, end in itertools.pairwise(cuts):
      if draw(st.booleans()):
        devices.append(device)
        offsets.append(begin)
        lengths.append(end - begin)
  documents = draw(st.permutations(range(len(lengths))))
  return Layout(
    tokens, degree, documents, lengths, devices, offsets, heads, ring
  )


def _slot(layout, device, index):
  """Device and slot of a token, from the definition of zigzag order."""
  size = layout.degree[device]
  ring = layout.ring and size > exchange_limit(layout.heads)
  if not ring:
    return device + index // layout.tokens, index % layout.tokens
  half = layout.tokens // 2
  chunk = index // half
  if chunk < size:
    return device + chunk, index % half
  return device + 2 * size - 1 - chunk, half + index % half


def _expected(layout, tokens, pad):
  """The step's arrays, token by token."""
  shape = len(layout.degree), layout.tokens
  out = {
    name: np.zeros(shape, np.float32 if name == "weights" else np.int32)
    for name in ("weights", "positions", "start", "stop")
  }
  out |= {name: np.full(shape, pad, np.int32) for name in ("tokens", "targets")}
  for device in range(shape[0]):
    if device % layout.degree[device]:
      continue
    for index in range(layout.degree[device] * layout.tokens):
      slot = _slot(layout, device, index)
      out["start"][slot], out["stop"][slot] = index, index + 1
  for name, device, offset, length in zip(
    layout.documents, layout.devices, layout.offsets, layout.lengths
  ):
    for i in range(length):
      slot = _slot(layout, device, offset + i)
      out["tokens"][slot] = tokens[name][i]
      out["positions"][slot] = i
      out["start"][slot], out["stop"][slot] = offset, offset + length
      if i + 1 < length:
        out["targets"][slot] = tokens[name][i + 1]
        out["weights"][slot] = 1
  return out | {"degree": np.array(layout.degree)}


@settings(max_examples=60, deadline=None)
@given(layout=layouts() | layouts(heads=2, ring=True))
def test_arrays_match_their_definition(layout):
  rng = np.random.default_rng(0)
  tokens = [None] * len(layout.lengths)
  for name, length in zip(layout.documents, layout.lengths):
    tokens[name] = rng.integers(1, 100, length)
  arrays = layout.arrays(tokens, pad=-1)
  expected = _expected(layout, tokens, -1)
  assert arrays.keys() == expected.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
    kind = np.float32 if name == "weights" else np.int32
    assert array.dtype == kind


@settings(max_examples=20, deadline=None)
@given(layout=layouts(heads=2, ring=True))
def test_json_round_trip(layout):
  assert Layout.from_json(layout.to_json()) == layout


def test_zigzag_balances_causal_work():
  layout = Layout.place(16, [8] * 8, [128], [0], heads=2, ring=True)
  work = (layout.index() + 1).sum(1)
  np.testing.assert_array_equal(work, np.full(8, 128 * 129 // 2 // 8))


def test_weights_are_those_of_the_next_token():
  layout = Layout.place(4, [1], [3], [0])
  weights = layout.arrays([[5, 6, 7]], [[9.0, 0.0, 0.5]])["weights"]
  np.testing.assert_array_equal(weights, [[0, 0.5, 0, 0]])


def test_place_packs_in_order():
  layout = Layout.place(8, [2, 2, 1, 1], [5, 3, 4, 8], [0, 2, 0, 3])
  assert layout.offsets == (0, 0, 5, 0)
  assert layout.documents == (0, 1, 2, 3)


def test_empty_layout_is_padding():
  layout = Layout.place(4, [2, 2], [], [])
  arrays = layout.arrays([])
  assert not arrays["weights"].any()
  np.testing.assert_array_equal(arrays["start"].ravel(), np.arange(8))


def test_uniform_degree_and_fill():
  assert Layout(**MIXED).uniform_degree is None
  assert Layout.place(4, [2, 2], [4], [0]).uniform_degree == 2
  assert Layout(**MIXED).fill == 100 / 128


@pytest.mark.parametrize(
  "heads,limit", [(32, 32), (12, 4), (9, 1), (1, 1), (40, 8)]
)
def test_exchange_limit(heads, limit):
  assert exchange_limit(heads) == limit


BAD = [
  (dict(degree=(4, 4, 4, 4, 3, 2, 1, 1)), "degree 3 of device 4 .* is 2"),
  (dict(degree=(4, 4, 4, 4, 0, 2, 1, 1)), "degree 0 of device 4"),
  (dict(degree=(1, 2, 2, 1, 2, 2, 1, 1)), "degree 2 of device 1 .* 0 to 1"),
  (dict(degree=(4, 4, 2, 2, 2, 2, 1, 1)), "degree 4 of device 0 .* 0 to 3"),
  (dict(degree=(1,) * 7 + (2,)), "degree 2 of device 7 .* 6 to 7"),
  (dict(degree=(16,) * 8), "0 to 15 .* 8 devices"),
  (dict(degree=()), "needs devices"),
  (dict(degree=(1.5,) * 8), "degree must be whole numbers"),
  (dict(tokens=16.5), "tokens must be whole numbers, got .16.5"),
  (dict(heads=6), "degree 4 of device 0 is above 2.* 6 heads"),
  (dict(heads=9), "degree 4 of device 0 is above 1.* 9 heads"),
  (dict(heads=9, ring=True, tokens=25), "even number of tokens .* 25"),
  (dict(documents=(3, 0, 3, 7)), "document 3 is placed twice"),
  (dict(documents=(3, 0, 7)), "equal lengths"),
  (dict(lengths=(0, 14, 20, 16)), "document 3 has 0 tokens"),
  (dict(lengths=(50, 15, 20, 16)), "document 0 has 15 .* 4 x 16 = 64"),
  (dict(offsets=(0, 49, 5, 0)), "document 0 overlaps .* device 0"),
  (dict(offsets=(-1, 50, 5, 0)), "document 3 .* from -1"),
  (dict(devices=(0, 0, 8, 6)), "document 2 is on device 8; .* 0 to 7"),
  (dict(devices=(1, 0, 4, 6)), "document 3 is on device 1, .* 0 leads"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_broken_invariants_are_named(change, message):
  with pytest.raises(ValueError, match=message) as error:
    Layout(**(MIXED | change))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "change,message",
  [
    (lambda x: "{", "not a layout"),
    (lambda x: "[]", "version None"),
    (lambda x: json.dumps(x | {"version": 2}), "version 2 .* only 1"),
    (lambda x: json.dumps(x | {"speed": 2}), "unknown: speed"),
    (lambda x: json.dumps({"version": 1, "tokens": 2}), "missing .*degree"),
  ],
)
def test_unreadable_json(change, message):
  with pytest.raises(ValueError, match=message):
    Layout.from_json(change(json.loads(Layout(**MIXED).to_json())))


def test_wrong_document_length():
  with pytest.raises(ValueError, match="document 0 has 3 tokens, not the 2"):
    Layout.place(4, [1], [2], [0]).arrays([[1, 2, 3]])


def test_missing_document():
  with pytest.raises(ValueError, match="places document 1, the batch has 1"):
    Layout(4, [1], [1], [2], [0], [0]).arrays([[1, 2]])


def test_draw():
  lines = Layout(**MIXED).draw(width=16).splitlines()
  assert lines[0] == "8 devices x 16 tokens, 4 documents, 78% full"
  bars = [line.split("|")[1] for line in lines[1:]]
  assert bars == [
    "a" * 12 + "b" * 4,
    ".." + "c" * 10 + "....",
    "d" * 16,
    "." * 16,
  ]


def test_plot(tmp_path):
  Layout(**MIXED).plot(tmp_path / "layout.png")
  assert (tmp_path / "layout.png").read_bytes()[:4] == b"\x89PNG"
