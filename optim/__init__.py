if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.optim, not optim: a second copy would define every class twice"
  )

from collections.abc import Callable

import optax
from optax import adafactor, adamw, lion, sgd

from adaptax.optim.batch_size import BATCH_SIZES
from adaptax.optim.decay import decayed
from adaptax.optim.schedules import SCHEDULES, schedule

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adafactor": adafactor,
  "adamw": adamw,
  "lion": lion,
  "sgd": sgd,
}

__all__ = [
  "BATCH_SIZES",
  "OPTIMIZERS",
  "SCHEDULES",
  "decayed",
  "schedule",
]
