"""Which leaves weight decay applies to."""

from typing import Any

import jax

# Scales and biases have no scale-invariant partner that decay would balance.
UNDECAYED = ("bias", "scale", "magnitude")


def decayed(params: Any) -> Any:
  """Returns a tree of bools: decay matrices, not scales and biases.

  The leaf's name decides, since a stacked bias is as two-dimensional as a
  matrix.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _name(path) not in UNDECAYED, params
  )


def _name(path) -> str:
  return str(getattr(path[-1], "key", path[-1])) if path else ""
