if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.parallel, not parallel: a second copy would define every class twice"
  )

from adaptax.parallel.attention import EXECUTORS, make_attend, static_degree
from adaptax.parallel.layout import Layout, exchange_limit
from adaptax.parallel.placement import Placement, widest_degree
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
  "EXECUTORS",
  "Layout",
  "Placement",
  "by_row",
  "exchange_limit",
  "flat_mesh",
  "fsdp",
  "fsdp_spec",
  "make_attend",
  "place",
  "shard_model",
  "static_degree",
  "widest_degree",
]
