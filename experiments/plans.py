"""How documents become micro-batches: the part that `config.plan` names.

A plan chooses the documents of a global batch, lays them out, and gives the
model the attention function that belongs to its layout.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adaptax.experiments.data import Batch, Data, Piece, pipeline
from adaptax.experiments.step import Attention
from adaptax.pallas_kernels.packed_attention import packed_attention
from adaptax.parallel import (
  AXIS,
  Placement,
  make_attend,
  widest_degree,
)

Arrays = dict[str, np.ndarray]


class Plan(Protocol):
  """What a run asks of a plan.

  Attributes:
    longest: tokens of the longest piece of a document that it can place.
    rows: rows of a micro-batch, over all devices.
    tokens: tokens of a row, T.
  """

  longest: int
  rows: int
  tokens: int

  def train_batches(
    self, data: Data, *, micro_batches: int, seed: int
  ) -> grain.DatasetIterator[Batch]:
    """Returns endless, resumable batches, arrays (micro_batches, rows, T)."""

  def eval_batches(self, data: Data, windows: int) -> list[Arrays]:
    """Returns micro-batches (rows, T) of `windows` held-out rows or more."""

  def attention(self, mesh: Mesh) -> Attention:
    """Returns what makes the attention function of a micro-batch."""


class Pack:
  """Rows of whole documents, each row attended on the device that holds it."""

  def __init__(
    self, *, tokens: int = 256, rows: int = 1, devices: int, heads: int
  ):
    """Args: tokens: of a row, T. rows: of a micro-batch, over all devices."""
    del heads
    if rows < 1 or rows % devices:
      raise ValueError(
        f"plan.rows {rows} is not a positive multiple of the {devices} devices"
      )
    self.tokens = self.longest = tokens
    self.rows = rows

  def train_batches(self, data, *, micro_batches, seed):
    return data.train_batches(
      rows=self.rows, micro_batches=micro_batches, seed=seed
    )

  def eval_batches(self, data, windows):
    batches = data.eval_batches(rows=self.rows, limit=windows)
    return [batch.arrays for batch in batches]

  def attention(self, mesh):
    def attention(batch):
      def attend(q, k, v, **options):
        local = functools.partial(packed_attention, **options)
        if mesh.size > 1:
          local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(AXIS),
            check_vma=False,
          )
        return local(q, k, v, batch["start"])

      return attend

    return attention


class Greedy:
  """Whole documents over the smallest group of devices that holds each.

  A micro-batch is one row a device; groups of every degree stand side by side
  in it, and one compiled step serves all layouts.
  """

  def __init__(
    self, *, tokens: int = 256, ring: bool = False, devices: int, heads: int
  ):
    """Args: tokens: of a device, T. ring: degrees above the head count too."""
    self.tokens, self.rows = tokens, devices
    self._widest = widest_degree(devices, heads, ring)
    self.longest = tokens * self._widest
    self._ring = ring
    self._placement = functools.partial(
      Placement, devices, tokens, heads=heads, ring=ring
    )

  def train_batches(self, data, *, micro_batches, seed):
    room = lambda: self._placement(micro_batches)

    def lay_out(pieces: list[Piece]) -> Batch:
      arrays = list(self._arrays(pieces, micro_batches))
      stacked = {key: np.stack([a[key] for a in arrays]) for key in arrays[0]}
      return Batch(stacked, np.array([len(piece.tokens) for piece in pieces]))

    return pipeline.endless(data.train, room, lay_out, seed=seed)

  def eval_batches(self, data, windows):
    room = lambda: self._placement(1)
    chosen = pipeline.GlobalBatches(data.held_out, room, seed=0, epochs=1)
    count = -(-windows // self.rows)
    return [
      arrays
      for pieces in itertools.islice(chosen, count)
      for arrays in self._arrays(pieces, 1)
    ]

  def _arrays(
    self, pieces: list[Piece], micro_batches: int
  ) -> Iterator[Arrays]:
    placement = self._placement(micro_batches)
    for piece in pieces:
      placement.add(len(piece.tokens))
    tokens, weights = zip(*pieces)
    for layout in placement.layouts():
      yield layout.arrays(tokens, weights)

  def attention(self, mesh):
    return lambda batch: make_attend(
      mesh,
      AXIS,
      batch["degree"],
      batch["start"],
      batch["stop"],
      max_degree=self._widest,
      ring=self._ring,
    )


PLANS: dict[str, Callable[..., Plan]] = {"greedy": Greedy, "pack": Pack}
