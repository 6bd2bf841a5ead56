"""Which device works on which document: a sequence-parallel layout as data.

N devices hold T tokens each. Consecutive devices of equal degree s form
groups of s, and a group holds one packed buffer of s * T tokens, so a long
document gets a wide group while short ones share single devices in the same
micro-batch. A compiled step takes all of it as arrays.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

VERSION = 1
_TABLES = ("degree", "documents", "lengths", "devices", "offsets")
_SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def exchange_limit(heads: int) -> int:
  """Returns the largest power of two that divides the number of query heads.

  A group shares the heads out evenly, so this is the widest group that the
  head exchange alone can serve: 32 for 32 heads, 4 for 12 and 1 for 9.
  """
  if heads < 1:
    raise ValueError(f"a model has at least one query head, got {heads}")
  return heads & -heads


@dataclasses.dataclass(frozen=True)
class Layout:
  """The degree of every device and the place of every document.

  Attributes:
    tokens: T, the tokens that each device holds.
    degree: (N,) degree of each device's group, a power of two. Groups are
      aligned: one of degree s begins at a multiple of s.
    documents: (K,) index of each document in the batch that it comes from.
    lengths: (K,) its tokens.
    devices: (K,) first device of the group that holds it.
    offsets: (K,) where it begins in the group's buffer.
    heads: query heads of the model, which bound the degree (see
      `exchange_limit`); None leaves it unbounded.
    ring: allows degrees above that bound. Such a group keeps its buffer in
      zigzag order: device i of s holds chunks i and 2 s - 1 - i of the 2 s
      chunks of T / 2 tokens, which balances causal attention.

  Raises:
    ValueError: if the layout breaks one of these rules, or if documents
      overlap, do not fit, or are placed twice.
  """

  tokens: int
  degree: tuple[int, ...]
  documents: tuple[int, ...]
  lengths: tuple[int, ...]
  devices: tuple[int, ...]
  offsets: tuple[int, ...]
  heads: int | None = None
  ring: bool = False

  def __post_init__(self):
    for name in _TABLES:
      table = _integers(name, getattr(self, name))
      object.__setattr__(self, name, tuple(table.tolist()))
    tokens = _integers("tokens", [self.tokens]).item()
    object.__setattr__(self, "tokens", tokens)
    _check_degrees(self)
    _check_documents(self)

  @classmethod
  def place(
    cls,
    tokens: int,
    degree: Sequence[int],
    lengths: Sequence[int],
    devices: Sequence[int],
    documents: Sequence[int] | None = None,
    *,
    heads: int | None = None,
    ring: bool = False,
  ) -> "Layout":
    """Packs documents, in their order, into the groups named by `devices`.

    Arguments are those of the class; `documents` defaults to 0 .. K - 1.
    """
    sizes = _integers("lengths", lengths)
    groups = _integers("devices", devices)
    if len(sizes) != len(groups):
      raise ValueError(
        f"{len(sizes)} lengths need as many devices, got {len(groups)}"
      )
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(sizes[order])
    begins = ends - sizes[order]
    leader = np.searchsorted(groups[order], groups[order])
    offsets = np.empty_like(sizes)
    offsets[order] = begins - begins[leader]
    if documents is None:
      documents = range(len(sizes))
    # The class makes tuples of whatever holds whole numbers.
    tables: Any = (degree, documents, sizes, groups, offsets)
    tables = dict(zip(_TABLES, tables))
    return cls(tokens, **tables, heads=heads, ring=ring)

  @property
  def first_device(self) -> np.ndarray:
    """(N,) the first device of each device's group."""
    return np.arange(len(self.degree)) // self.degree * self.degree

  @property
  def uniform_degree(self) -> int | None:
    """The degree that all groups share, or None where they differ."""
    return self.degree[0] if len(set(self.degree)) == 1 else None

  @property
  def fill(self) -> float:
    """Share of the N * T slots that hold a document's token."""
    return sum(self.lengths) / (self.tokens * len(self.degree))

  def index(self) -> np.ndarray:
    """(N, T) int32, the index in its group's buffer of each slot's token."""
    degree = np.asarray(self.degree, np.int32)[:, None]
    member = np.arange(len(degree), dtype=np.int32)[:, None] % degree
    slot = np.arange(self.tokens, dtype=np.int32)
    index = member * np.int32(self.tokens) + slot
    if (far := _above_limit(self)).any():
      half = np.int32(self.tokens // 2)
      chunk = np.where(slot < half, member, 2 * degree - 1 - member)
      index = np.where(far[:, None], chunk * half + slot % half, index)
    return index

  def bounds(self) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) int32 `start` and `stop` of the document of each slot's token.

    Both are indices in the group's buffer, `stop` is exclusive. A padding
    token is a document of its own.
    """
    index = self.index()
    ends = [o + n for o, n in zip(self.offsets, self.lengths)]
    return self._fill(index, self.offsets), self._fill(index + 1, ends)

  def arrays(
    self,
    tokens: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None = None,
    pad: int = 0,
  ) -> dict[str, np.ndarray]:
    """Returns the arrays that a training step takes.

    Args:
      tokens: token ids of every document of the batch, by document index.
      weights: loss weight of each of these tokens as a target; 1 if None.
      pad: token id of the empty slots.

    Returns:
      `degree` (N,) int32, and (N, T) each: `tokens`, `targets`, `positions`,
      `start`, `stop` int32 and `weights` float32. `weights` is zero at a
      document's last token and on padding, `positions` restart in every
      document, and `start` and `stop` are those of `bounds`.
    """
    if max(self.documents, default=-1) >= len(tokens):
      raise ValueError(
        f"the layout places document {max(self.documents)}, the batch has"
        f" {len(tokens)} documents"
      )
    documents = [np.asarray(tokens[i]) for i in self.documents]
    for name, length, document in zip(self.documents, self.lengths, documents):
      if len(document) != length:
        raise ValueError(
          f"document {name} has {len(document)} tokens, not the {length} that"
          " the layout was made for"
        )
    index, (start, stop) = self.index(), self.bounds()
    empty = np.full(index.shape, pad, np.int32)
    weight = (index < stop - 1).astype(np.float32)
    if weights is not None:
      of_next = [np.append(weights[i][1:], 0) for i in self.documents]
      weight *= self._fill(np.zeros_like(weight), of_next)
    return {
      "degree": np.asarray(self.degree, np.int32),
      "tokens": self._fill(empty, documents),
      "targets": self._fill(empty, [np.append(x[1:], pad) for x in documents]),
      "weights": weight,
      "positions": index - start,
      "start": start,
      "stop": stop,
    }

  def _fill(self, background: np.ndarray, values: Sequence) -> np.ndarray:
    """Copies (N, T) `background`, sets each document's slots to its value."""
    order = None
    flat = background.ravel().copy()
    if _above_limit(self).any():
      # Documents are contiguous in the buffers, not in the slots.
      order = self.first_device[:, None] * self.tokens + self.index()
      flat[order.ravel()] = background.ravel()
    begins = np.multiply(self.devices, self.tokens) + self.offsets
    for begin, length, value in zip(begins, self.lengths, values):
      flat[begin : begin + length] = value
    return (flat if order is None else flat[order]).reshape(background.shape)

  def to_json(self) -> str:
    """Returns the layout as a JSON object with a format version."""
    return json.dumps({"version": VERSION, **vars(self)})

  @classmethod
  def from_json(cls, text: str) -> "Layout":
    """Reads what `to_json` wrote; ValueError names what does not fit."""
    try:
      fields = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(f"not a layout: {error}") from None
    version = fields.pop("version", None) if isinstance(fields, dict) else None
    if version != VERSION:
      raise ValueError(
        f"a layout of version {version} cannot be read, only {VERSION}"
      )
    known = {field.name for field in dataclasses.fields(cls)}
    if odd := sorted(known.symmetric_difference(fields)):
      raise ValueError(f"layout fields missing or unknown: {', '.join(odd)}")
    return cls(**fields)

  def draw(self, width: int = 64) -> str:
    """Returns a text drawing of who works on what, one line a group.

    A group's buffer spans `width` characters: letters are documents, dots
    are padding.
    """
    bars = {device: ["."] * width for device in self.first_device.tolist()}
    filled = dict.fromkeys(bars, 0)
    places = zip(self.devices, self.offsets, self.lengths)
    for i, (device, offset, length) in enumerate(places):
      room = self.degree[device] * self.tokens
      first = offset * width // room
      last = max((offset + length) * width // room, first + 1)
      symbol = _SYMBOLS[i % len(_SYMBOLS)]
      bars[device][first:last] = symbol * (last - first)
      filled[device] += length
    lines = [
      f"{len(self.degree)} devices x {self.tokens} tokens,"
      f" {len(self.documents)} documents, {self.fill:.0%} full"
    ]
    for device, bar in bars.items():
      degree = self.degree[device]
      share = filled[device] / (degree * self.tokens)
      lines.append(
        f"devices {device:>4} to {device + degree - 1:<4} degree {degree:<4}"
        f" |{''.join(bar)}| {share:>4.0%}"
      )
    return "\n".join(lines)

  def plot(self, path) -> None:
    """Draws devices down, their tokens across, coloured by document length.

    Args:
      path: of the PNG to write.
    """
    # Imported here because training needs no pictures.
    from matplotlib import colors, figure

    start, stop = self.bounds()
    index = self.index()
    lengths = np.where(stop - start > 1, stop - start, np.nan)
    devices, tokens = lengths.shape
    fig = figure.Figure((10, 1.5 + 0.25 * min(devices, 64)))
    axes = fig.subplots()
    image = axes.imshow(
      lengths,
      aspect="auto",
      interpolation="nearest",
      norm=colors.LogNorm(1, max(self.lengths, default=2) + 1),
    )
    fig.colorbar(image, label="tokens of the document (blank: padding)")
    row, slot = np.nonzero((index == start) & (stop - start > 1))
    axes.vlines(slot - 0.5, row - 0.5, row + 0.5, colors="white", lw=0.8)
    leaders = np.unique(self.first_device)
    axes.hlines(leaders - 0.5, -0.5, tokens - 0.5, colors="black", lw=1.2)
    axes.set_yticks(
      leaders + np.take(self.degree, leaders) / 2 - 0.5,
      [f"{d}: degree {self.degree[d]}" for d in leaders],
    )
    axes.set(xlabel="token on the device", ylabel="first device of the group")
    axes.set_title(f"{len(self.documents)} documents, {self.fill:.0%} full")
    fig.savefig(path, dpi=120, bbox_inches="tight")


def _integers(name: str, values) -> np.ndarray:
  """Returns whole numbers as (n,) int64; ValueError for anything else."""
  array = np.asarray(values)
  if array.size == 0:
    return np.zeros(0, np.int64)
  if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
    raise ValueError(f"{name} must be whole numbers, got {values!r}")
  return array.astype(np.int64)


def _above_limit(layout: Layout) -> np.ndarray:
  """(N,) whether each device's degree needs the ring."""
  degree = np.asarray(layout.degree)
  if layout.heads is None:
    return np.zeros(degree.shape, bool)
  return degree > exchange_limit(layout.heads)


def _check_degrees(layout: Layout) -> None:
  degree = np.asarray(layout.degree)
  devices = len(degree)
  if layout.tokens < 1 or not devices:
    raise ValueError(
      f"a layout needs devices and tokens, got {devices} x {layout.tokens}"
    )
  if (bad := (degree < 1) | (degree & (degree - 1) != 0)).any():
    device = int(np.argmax(bad))
    value = int(degree[device])
    near = 1 << max(value, 1).bit_length() - 1
    raise ValueError(
      f"degree {value} of device {device} is no power of two;"
      f" the nearest smaller is {near}"
    )
  for size in np.unique(degree):
    block = np.arange(devices) // size
    members = np.bincount(block, degree == size)
    if (bad := (degree == size) & (members[block] != size)).any():
      device = int(np.argmax(bad))
      begin = device // size * size
      raise ValueError(
        f"degree {size} of device {device} needs a group of devices {begin} to"
        f" {begin + size - 1} that all have it; of {devices} devices these"
        f" have {degree[begin : begin + size].tolist()}"
      )
  _check_limit(layout)


def _check_limit(layout: Layout) -> None:
  far = _above_limit(layout)
  if layout.heads is None or not far.any():
    return
  degree, limit = layout.degree[np.argmax(far)], exchange_limit(layout.heads)
  if not layout.ring:
    raise ValueError(
      f"degree {degree} of device {np.argmax(far)} is above {limit}, the"
      f" largest power of two that divides {layout.heads} heads; turn the ring"
      " on or use smaller groups"
    )
  if layout.tokens % 2:
    raise ValueError(
      f"a ring needs an even number of tokens a device, got {layout.tokens}"
    )


def _check_documents(layout: Layout) -> None:
  counts = {name: len(getattr(layout, name)) for name in _TABLES[1:]}
  if len(set(counts.values())) > 1:
    raise ValueError(f"a layout's tables must have equal lengths, got {counts}")
  if not layout.documents:
    return
  names = np.asarray(layout.documents)
  unique, count = np.unique(names, return_counts=True)
  if len(unique) < len(names):
    raise ValueError(f"document {unique[count > 1][0]} is placed twice")
  device, offset, length = (
    np.asarray(x) for x in (layout.devices, layout.offsets, layout.lengths)
  )

  def reject(bad, reason):
    if bad.any():
      i = int(np.argmax(bad))
      raise ValueError(f"document {names[i]} {reason(i)}")

  reject(length < 1, lambda i: f"has {length[i]} tokens, at least 1 is needed")
  devices = len(layout.degree)
  reject(
    (device < 0) | (device >= devices),
    lambda i: f"is on device {device[i]}; there are devices 0 to {devices - 1}",
  )
  first = layout.first_device[device]
  reject(
    first != device,
    lambda i: (
      f"is on device {device[i]}, inside the group that device {first[i]} leads"
    ),
  )
  room = np.asarray(layout.degree)[device] * layout.tokens
  reject(
    (offset < 0) | (offset + length > room),
    lambda i: (
      f"has {length[i]} tokens from {offset[i]} on, but the group at device"
      f" {device[i]} holds {room[i] // layout.tokens} x {layout.tokens} ="
      f" {room[i]}"
    ),
  )
  order = np.lexsort((offset, device))
  begin = (device * layout.tokens + offset)[order]
  late = np.zeros(len(names), bool)
  late[order[1:]] = (begin + length[order])[:-1] > begin[1:]
  reject(late, lambda i: f"overlaps the one before it on device {device[i]}")
