"""Fresh dropout masks for every step of a pure train step."""

from typing import Any

import jax
from flax import nnx


def reseed(model: Any, key: jax.Array) -> None:
  """Gives every random stream of a model, stacked ones too, its own key.

  Called on the model merged inside a step, with a key made from the step
  number: masks then depend on nothing but that key, and resuming is exact.

  Args:
    model: a module, changed in place.
    key: a scalar key, not used again by the caller.
  """
  streams = (node for _, node in nnx.iter_graph(model))
  tags = sorted({s.key.tag for s in streams if isinstance(s, nnx.RngStream)})
  if tags:
    keys = dict(zip(tags, jax.random.split(key, len(tags))))
    nnx.reseed(model, policy="match_shape", **keys)
