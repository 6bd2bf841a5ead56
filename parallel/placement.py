"""Fills the layouts of a global batch with documents, first come first served.

No cost model: each document gets the smallest group of devices that holds it.
"""

from collections.abc import Sequence

from adaptax.parallel.layout import Layout, exchange_limit


def smallest_degree(length: int, tokens: int) -> int:
  """Returns the least power of two of devices of T tokens for a document."""
  return 1 << (-(-length // tokens) - 1).bit_length()


class Placement:
  """The micro-batches of one global batch while documents still come in.

  A document goes to the fullest group of its smallest degree, else to devices
  that no group has yet, else to a gap in a wider group.

  Args:
    devices: N.
    tokens: T, the tokens that a device holds.
    micro_batches: layouts to fill, M.
    heads: query heads of the model.
    ring: allows degrees above what the heads can be exchanged over.
  """

  def __init__(
    self,
    devices: int,
    tokens: int,
    micro_batches: int,
    *,
    heads: int,
    ring: bool = False,
  ):
    self._devices, self._tokens = devices, tokens
    self._heads, self._ring = heads, ring
    self._left = devices * tokens * micro_batches
    # Free aligned blocks as (size, micro-batch, first device), and groups as
    # (degree, free tokens, micro-batch, first device).
    self._blocks = [
      (size, micro, begin)
      for micro in range(micro_batches)
      for size, begin in _aligned(devices)
    ]
    self._groups: list[tuple[int, int, int, int]] = []
    self._placed: list[tuple[int, int, int]] = []

  @property
  def full(self) -> bool:
    """Whether not a single token fits any more."""
    return self._left == 0

  def add(self, length: int) -> int | None:
    """Places a document of that many tokens.

    Returns:
      The micro-batch that it goes to, or None where it finds no room.
    """
    degree = smallest_degree(length, self._tokens)
    group = self._roomy(length, degree, degree)
    if group is None:
      group = self._open(degree)
    if group is None:
      group = self._roomy(length, degree, self._devices)
    if group is None:
      return None
    width, gap, micro, begin = group
    self._groups.append((width, gap - length, micro, begin))
    self._placed.append((length, micro, begin))
    self._left -= length
    return micro

  def layouts(self) -> list[Layout]:
    """Returns a layout a micro-batch; documents are numbered as they came."""
    found = []
    for micro in range(1 + max(block[1] for block in self._everything())):
      degree = [1] * self._devices
      for width, _, where, begin in self._groups:
        if where == micro:
          degree[begin : begin + width] = [width] * width
      here = [i for i, placed in enumerate(self._placed) if placed[1] == micro]
      found.append(
        Layout.place(
          self._tokens,
          degree,
          [self._placed[i][0] for i in here],
          [self._placed[i][2] for i in here],
          here,
          heads=self._heads,
          ring=self._ring,
        )
      )
    return found

  def _everything(self) -> list[tuple[int, ...]]:
    groups = [(width, micro, begin) for width, _, micro, begin in self._groups]
    return [*self._blocks, *groups]

  def _roomy(self, length: int, least: int, most: int):
    """Takes out the fitting group of least degree, then of least gap."""
    fitting = [
      group
      for group in self._groups
      if least <= group[0] <= most and group[1] >= length
    ]
    if not fitting:
      return None
    self._groups.remove(group := min(fitting))
    return group

  def _open(self, degree: int):
    """Makes a group of free devices, splitting the smallest block that does."""
    fitting = [block for block in self._blocks if block[0] >= degree]
    if not fitting:
      return None
    self._blocks.remove(block := min(fitting))
    size, micro, begin = block
    while size > degree:
      size //= 2
      self._blocks.append((size, micro, begin + size))
    return degree, degree * self._tokens, micro, begin


def widest_degree(devices: int, heads: int, ring: bool = False) -> int:
  """Returns the widest group that the devices and the heads allow."""
  widest = 1 << devices.bit_length() - 1
  return widest if ring else min(widest, exchange_limit(heads))


def _aligned(devices: int) -> Sequence[tuple[int, int]]:
  """Cuts N devices into aligned blocks of powers of two: (size, first)."""
  blocks, begin = [], 0
  while begin < devices:
    size = 1 << (devices - begin).bit_length() - 1
    blocks.append((size, begin))
    begin += size
  return blocks
