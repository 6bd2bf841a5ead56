import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptax.parallel.placement import (
  Placement,
  smallest_degree,
  widest_degree,
)


@pytest.mark.parametrize(
  "length, degree",
  [(1, 1), (16, 1), (17, 2), (32, 2), (33, 4), (64, 4), (65, 8), (128, 8)],
)
def test_the_smallest_power_of_two_that_holds_the_document(length, degree):
  assert smallest_degree(length, 16) == degree


def test_the_widest_group_is_bound_by_devices_and_heads():
  assert widest_degree(8, 32) == 8
  assert widest_degree(8, 12) == 4
  assert widest_degree(8, 9) == 1
  assert widest_degree(8, 9, ring=True) == 8
  assert widest_degree(6, 32) == 4


def test_mixed_degrees_stand_side_by_side():
  room = Placement(8, 16, 1, heads=8)
  assert [room.add(length) for length in (60, 30, 10, 16, 6)] == [0] * 5
  (layout,) = room.layouts()
  assert layout.degree == (4, 4, 4, 4, 2, 2, 1, 1)
  assert layout.devices == (0, 4, 6, 7, 6)
  assert layout.offsets == (0, 0, 0, 0, 10)


def test_gaps_of_wide_groups_serve_short_documents_at_last():
  room = Placement(2, 16, 1, heads=2)
  assert room.add(20) == 0
  assert room.add(12) == 0
  assert room.full
  assert room.add(1) is None
  assert room.layouts()[0].degree == (2, 2)


def test_a_document_that_finds_no_room_changes_nothing():
  room = Placement(4, 16, 2, heads=4)
  for length in (40, 20, 10):
    assert room.add(length) is not None
  before = room.layouts()
  assert room.add(61) is None
  assert room.layouts() == before


@given(
  st.sampled_from([1, 2, 4, 6, 8]),
  st.integers(1, 3),
  st.lists(st.integers(1, 128), max_size=60),
)
def test_every_document_that_is_taken_is_placed_once(devices, micro, lengths):
  heads = 8
  room = Placement(devices, 16, micro, heads=heads)
  most = 16 * widest_degree(devices, heads)
  taken = [
    length
    for length in lengths
    if length <= most and room.add(length) is not None
  ]
  # Layout itself refuses overlaps, overflow and misaligned groups.
  layouts = room.layouts()
  assert len(layouts) == micro
  placed = {
    index: length
    for layout in layouts
    for index, length in zip(layout.documents, layout.lengths)
  }
  assert [placed[i] for i in range(len(taken))] == taken
  assert len(placed) == len(taken)
  assert room.full == (sum(taken) == devices * 16 * micro)


@given(st.integers(1, 128))
def test_an_empty_batch_takes_any_document_up_to_the_widest_group(length):
  assert Placement(8, 16, 1, heads=8).add(length) == 0
