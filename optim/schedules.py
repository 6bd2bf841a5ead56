"""Learning-rate schedules: warm-up, then one of a few shapes by name."""

from collections.abc import Callable

import optax

from adaptax.pallas_kernels.errors import unknown_name


def constant(peak: float, steps: int, final: float) -> optax.Schedule:
  """Stays at the peak; `steps` and `final` do not matter."""
  del steps, final
  return optax.constant_schedule(peak)


def linear(peak: float, steps: int, final: float) -> optax.Schedule:
  """Falls in a straight line to `final` times the peak."""
  return optax.linear_schedule(peak, final * peak, steps)


def cosine(peak: float, steps: int, final: float) -> optax.Schedule:
  """Falls along half a cosine to `final` times the peak."""
  return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=final)


SCHEDULES: dict[str, Callable[[float, int, float], optax.Schedule]] = {
  "constant": constant,
  "linear": linear,
  "cosine": cosine,
}


def schedule(
  name: str, peak: float, steps: int, warmup: int = 0, final: float = 0.0
) -> optax.Schedule:
  """Returns the learning rate as a function of the step.

  Args:
    name: a key of `SCHEDULES`.
    peak: the highest learning rate.
    steps: length of the run, warm-up included.
    warmup: steps of linear rise from `peak / warmup`.
    final: learning rate at the end as a fraction of the peak.
  """
  if name not in SCHEDULES:
    raise unknown_name("schedule", name, SCHEDULES)
  if not 0 <= warmup <= steps:
    raise ValueError(
      f"schedule: warmup {warmup} is not within the run of {steps} steps"
    )
  body = SCHEDULES[name](peak, steps - warmup, final)
  if warmup == 0:
    return body
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, body], [warmup])
