if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.parallel, not parallel: a second copy would define every class twice"
  )

from adaptax.parallel.sharding import (
  AXIS,
  by_row,
  flat_mesh,
  fsdp,
  fsdp_spec,
  place,
  shard_model,
)

__all__ = [
  "AXIS",
  "by_row",
  "flat_mesh",
  "fsdp",
  "fsdp_spec",
  "place",
  "shard_model",
]
