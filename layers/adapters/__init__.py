"""Parameter-efficient adapters under one protocol.

A method is one file here and one import line below.
"""

from adaptax.layers.adapters.base import (
  Adapter,
  AdapterBuffer,
  AdapterParam,
  Count,
  adapt,
  adapters,
  count,
  find_rule,
  merge,
  replace_linear,
  trainable,
  trainable_filter,
)
from adaptax.layers.adapters.lora import LoRA

ADAPTERS: dict[str, type[Adapter]] = {
  value.name: value
  for value in list(globals().values())
  if isinstance(value, type)
  and issubclass(value, Adapter)
  and value is not Adapter
}

__all__ = [
  "ADAPTERS",
  "Adapter",
  "AdapterBuffer",
  "AdapterParam",
  "Count",
  "LoRA",
  "adapt",
  "adapters",
  "count",
  "find_rule",
  "merge",
  "replace_linear",
  "trainable",
  "trainable_filter",
]
