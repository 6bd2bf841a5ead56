"""Reads a finished or running run back, without changing it."""

import pathlib
import tempfile
from typing import Any

import jax
from flax import nnx

from adaptax.experiments import config as configs
from adaptax.experiments.checkpoints import CheckpointError, Checkpoints
from adaptax.experiments.fingerprint import fingerprint
from adaptax.experiments.run import Run
from adaptax.parallel import flat_mesh


def read(
  root: pathlib.Path,
  steps: list[pathlib.Path] | None = None,
  devices: list[jax.Device] | None = None,
) -> tuple[Run, nnx.Module]:
  """Returns a run and its model, as saved in the newest of some checkpoints.

  Args:
    root: the work dir of the run.
    steps: folders of checkpoints; None means all.
    devices: that the model is spread over; None means all, or one where the
      run's rows do not fit all.

  Raises:
    FileNotFoundError: no run or no checkpoint there.
    ValueError: the base model is no longer the one that the run adapted.
  """
  if not (root / "config.json").exists():
    raise FileNotFoundError(f"{root} is no run: it has no config.json")
  config = configs.from_json((root / "config.json").read_text("utf-8"))
  if steps is None:
    steps = sorted((root / "checkpoints").glob("[0-9]*"))
  if devices is None:
    devices = jax.devices()
    if config.plan.get("rows", len(devices)) % len(devices):
      devices = devices[:1]
  run = Run(config, flat_mesh(devices))
  frozen = run.model.materialise()[1]
  state, meta = _restore(run, steps)
  if meta["frozen"] != fingerprint(frozen):
    raise ValueError(
      f"the weights of model {config.model.name!r} are not those that the run"
      f" in {root} adapted"
    )
  return run, run.module(state["trainable"], frozen)


def _restore(run: Run, steps: list[pathlib.Path]) -> tuple[Any, dict]:
  # Links, because opening the run's own folder tidies it, which only the run
  # itself may do.
  with tempfile.TemporaryDirectory() as view:
    for step in steps:
      if step.name.isdigit() and step.is_dir():
        (pathlib.Path(view) / step.name).symlink_to(step.absolute())
    where = steps[0] if len(steps) == 1 else "the work dir"
    with Checkpoints(view, every=1, keep=len(steps) + 1) as checkpoints:
      try:
        found = checkpoints.restore(run.state)
      except CheckpointError as error:
        # Its message would name the temporary folder.
        raise FileNotFoundError(f"no good checkpoint in {where}") from error
  if found is None:
    raise FileNotFoundError(f"no checkpoint in {where}")
  newest, state, meta = found
  print(f"checkpoint step {newest}")
  return state, meta
