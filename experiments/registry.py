"""Every part that a config may name, and the keys of every section."""

from typing import Any

from adaptax.experiments.config import Section
from adaptax.experiments.data import SOURCES
from adaptax.experiments.models import MODELS
from adaptax.experiments.plans import PLANS
from adaptax.layers.adapters import ADAPTERS
from adaptax.optim import BATCH_SIZES, OPTIMIZERS


def no_adapter() -> None:
  """Trains all weights."""


def data_source(
  *,
  path: str = "",
  glob: str = "",
  tokenizer: str = "model",
  holdout: float = 0.05,
  long_documents: str = "split",
  empty_documents: str = "skip",
) -> dict[str, Any]:
  """Returns the arguments of `data.load`, the same for every source."""
  return locals()


REGISTRIES: dict[str, Any] = {
  "model": Section(parts=MODELS),
  "data": Section(parts=dict.fromkeys(SOURCES, data_source)),
  "adapter": Section(
    parts={"none": no_adapter, **ADAPTERS},
    supplied=("base", "rngs"),
    keys={"targets": "attention/(q|v)", "rules": ()},
  ),
  "optimizer": Section(
    parts=OPTIMIZERS,
    supplied=("learning_rate", "mask", "weight_decay_mask"),
    keys={
      "learning_rate": 1e-3,
      "schedule": "constant",
      "warmup": 0,
      "final": 0.0,
      "clip_norm": 0.0,
    },
  ),
  "batch_size": Section(parts=BATCH_SIZES),
  "plan": Section(parts=PLANS, supplied=("devices", "heads")),
  "checkpoint": Section(keys={"every": 100, "keep": 2}),
  "eval": Section(keys={"every": 0, "windows": 16}),
  "profile": Section(keys={"start": 0, "steps": 0}),
  "steps": 100,
  "seed": 0,
  "loss_chunk": 0,
  "find_nonfinite": False,
  "tensorboard": True,
}
