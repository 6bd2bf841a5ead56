"""Counts the FLOPs of a traced program, which XLA does for no loop."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(jaxpr: Any, platform: str) -> tuple[float, bool]:
  """Counts the FLOPs of matrix products of all devices together.

  Args:
    jaxpr: of a traced function; loops count as often as they run.
    platform: chooses the branches of `lax.platform_dependent`.

  Returns:
    The count, and whether there is more in kernels without a cost estimate or
    in loops whose bounds are data, which count as nothing.
  """
  total, unseen = 0.0, False
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    flops, more = _equation_flops(equation, platform)
    total, unseen = total + flops, unseen or more
  return total, unseen


def _equation_flops(equation, platform) -> tuple[float, bool]:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    depth = math.prod(shape[axis] for axis in contracted)
    return 2.0 * depth * equation.outvars[0].aval.size, False
  if name == "pallas_call":
    cost = params.get("cost_estimate")
    return (float(cost.flops), False) if cost else (0.0, True)
  inner = [product_flops(sub, platform) for sub in _inside(params)]
  if not inner:
    return 0.0, False
  if name == "while":
    return 0.0, any(flops or more for flops, more in inner)
  if name == "cond":
    return _branch(inner, params.get("branches_platforms"), platform)
  times = params.get("length", 1) if name == "scan" else 1
  if name == "shard_map":
    times = params["mesh"].size
  flops, unseen = zip(*inner)
  return times * sum(flops), any(unseen)


def _branch(inner, platforms, platform) -> tuple[float, bool]:
  """The branch for a platform, or the dearest one."""
  for branch, names in zip(inner, platforms or ()):
    if names is None or platform in names:
      return branch
  return max(inner)


def _inside(params) -> Iterator[Any]:
  for value in jax.tree.leaves(
    list(params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
  ):
    if isinstance(value, ClosedJaxpr | Jaxpr):
      yield value
