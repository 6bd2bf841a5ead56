"""Reads the text of a compiled HLO module: loops, collectives, traffic."""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)

# What moves no bytes itself: names for values, and control flow around others.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "iota", "after-all", "partition-id"),
}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
  """An array type; `dims` as one device has them, `hbm` False in a scratchpad."""

  dtype: str
  dims: tuple[int, ...]
  hbm: bool

  @property
  def bytes(self) -> int:
    """Of its elements, without the padding of tiled layouts."""
    found = re.search(r"\d+", self.dtype)
    bits = int(found[0]) if found else 8
    return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  @property
  def done(self) -> bool:
    """Whether it only ends what a `-start` began."""
    return self.opcode.endswith(("-done", "-update"))

  def called(self, *keys: str) -> list[str]:
    """The computations named by some attributes."""
    found = re.findall(
      rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes
    )
    return re.findall(r"[\w.\-]+", " ".join(found))

  @property
  def op_name(self) -> str:
    """The path in the JAX program that it comes from, if known."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


class Total(NamedTuple):
  """Executions of a kind of collective, and bytes of its whole arrays."""

  executions: int = 0
  bytes: int = 0


Computation = dict[str, Instruction]


class Module:
  """A parsed module.

  Attributes:
    computations: their instructions by name.
    entry: name of the computation that runs.
  """

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry, inside = "", None
    for line in text.splitlines():
      if header := _HEADER.match(line):
        inside = self.computations[header[2]] = {}
        self.entry = header[2] if header[1] else self.entry
      elif inside is not None and (found := _INSTRUCTION.match(line)):
        inside[found[2]] = _parse(*found.groups())

  def runs(self) -> Iterator[tuple[Computation, int, int, bool]]:
    """Each run of a computation from the entry on.

    Yields:
      (computation, how often it runs in a step, trip count of the loop whose
      body it is, whether it is the inside of a fusion). A loop whose bounds
      are data counts once; so does every branch of a conditional.
    """
    stack = [(self.entry, 1, 1, False)]
    while stack:
      name, times, trips, fused = stack.pop()
      computation = self.computations[name]
      yield computation, times, trips, fused
      for instruction in computation.values():
        if instruction.done:
          continue
        if instruction.opcode == "while":
          trip = self.trip_count(computation, instruction) or 1
          (body,) = instruction.called("body")
          stack.append((body, times * trip, trip, fused))
        elif instruction.opcode == "call":
          for callee in instruction.called("to_apply"):
            stack.append((callee, times, trips, fused))
        else:
          branches = "branch_computations", "true_computation", "calls"
          control = instruction.opcode == "conditional"
          for callee in instruction.called(*branches, "false_computation"):
            stack.append((callee, times, trips, fused or not control))

  def collectives(self) -> dict[str, Total]:
    """What one device takes part in during a step, by kind.

    Bytes are those of the whole array: what an all-gather makes, what the
    other kinds take. An all-reduce of which a fusion keeps a slice is how
    libtpu writes a reduce-scatter, and counts as one.
    """
    found: dict[str, Total] = {}
    for computation, times, _, fused in self.runs():
      for instruction in computation.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
          continue
        cut = _root(computation).opcode == "dynamic-slice"
        if kind == "all-reduce" and fused and cut:
          kind = "reduce-scatter"
        operands = self._operands(computation, instruction)
        taken, made = sum(a.bytes for a in operands), instruction.bytes
        # The result of an asynchronous start repeats its operands.
        made -= taken if instruction.opcode.endswith("-start") else 0
        size = made if kind == "all-gather" else taken
        executions, total = found.get(kind, Total())
        found[kind] = Total(executions + times, total + times * size)
    return found

  def traffic(self) -> float:
    """Estimates the bytes that a step reads from and writes to main memory.

    Every operation reads its operands and writes its results once; of arrays
    that are stacked over the iterations of a loop, one slice an iteration.
    """
    total = 0.0
    for computation, times, trips, fused in self.runs():
      if fused:
        continue
      for instruction in computation.values():
        operands = self._operands(computation, instruction)
        if instruction.opcode in _FREE or instruction.done or not operands:
          continue
        for array in (*instruction.arrays, *operands):
          stacked = trips > 1 and array.dims[:1] == (trips,)
          share = trips if stacked else 1
          total += array.hbm * times * array.bytes / share
    return total

  def find(self, name: str) -> Instruction | None:
    """Returns the instruction of that name in any computation."""
    return self._by_name.get(name)

  @functools.cached_property
  def _by_name(self) -> Computation:
    pairs = (c.items() for c in self.computations.values())
    return dict(itertools.chain(*pairs))

  def trip_count(self, outer: Computation, loop: Instruction) -> int | None:
    """Iterations of a `while` that counts up by one between constants."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    (name,) = loop.called("condition")
    condition = self.computations[name]
    root = _root(condition)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return None
    index, bound = (condition[operand] for operand in root.operands)
    start = outer.get(loop.operands[0])
    position = re.search(r"index=(\d+)", index.attributes)
    if start is None or start.opcode != "tuple" or position is None:
      return None
    first = _constant(outer, start.operands[int(position[1])])
    last = _constant(condition, bound.name)
    return None if first is None or last is None else last - first

  def _operands(self, computation, instruction) -> list[Array]:
    known = (computation.get(name) for name in instruction.operands)
    return [array for one in known if one for array in one.arrays]


def _root(computation: Computation) -> Instruction:
  return next(one for one in computation.values() if one.root)


def _constant(computation: Computation, name: str) -> int | None:
  """The value of an integer constant behind copies."""
  instruction = computation.get(name)
  while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
    instruction = computation.get(instruction.operands[0])
  if instruction is None or instruction.opcode != "constant":
    return None
  found = re.match(r"-?\d+", instruction.attributes)
  return int(found[0]) if found else None


def _parse(root: str | None, name: str, text: str) -> Instruction:
  """Takes apart `type opcode(operands), attributes`."""
  end = _closing(text) if text.startswith("(") else text.index(" ")
  kind, rest = text[:end], text[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  operands = re.findall(r"%([\w.\-]+)", rest[: end - 1])
  # A constant's value is all that stands in its parentheses.
  attributes = rest if opcode == "constant" else rest[end:]
  arrays = (_array(*found) for found in _ARRAY.findall(kind))
  return Instruction(
    name, opcode, tuple(arrays), tuple(operands), attributes, bool(root)
  )


def _array(dtype: str, dims: str, layout: str) -> Array:
  sizes = re.findall(r"\d+", dims)
  space = re.search(r"S\((\d+)\)", layout)
  return Array(dtype, tuple(map(int, sizes)), space is None)


def _closing(text: str) -> int:
  """The index behind the parenthesis that closes the first one."""
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.end()
  return len(text)
