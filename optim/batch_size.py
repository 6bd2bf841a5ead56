"""Controllers of the global batch size, counted in micro-batches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Constant:
  """The same number of micro-batches at every step.

  Attributes:
    micro_batches: micro-batches that one optimizer step accumulates.
  """

  micro_batches: int = 1

  def __post_init__(self):
    if self.micro_batches < 1:
      raise ValueError(
        f"micro_batches {self.micro_batches} is below the least batch, 1"
      )


BATCH_SIZES = {"constant": Constant}
