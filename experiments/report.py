"""What a run tells its user: header, log lines, profile, footer."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adaptax.experiments.metrics import Metrics, Progress, read

MEBIBYTE = 2**20


def say(text: str) -> None:
  """Prints a line, once for all processes."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _sizes(tree: Any) -> tuple[int, int]:
  leaves = [
    leaf
    for leaf in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  ]
  return (
    sum(leaf.size for leaf in leaves),
    sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
  )


def header(run: Any, corpus: Any) -> None:
  """Prints model, parameters, optimizer state, devices and data."""
  c, model = run.config, run.source.config
  trained, trained_bytes = _sizes(run.model.split.trainable)
  frozen, frozen_bytes = _sizes(run.model.split.frozen)
  _, optimizer_bytes = _sizes(run.state["optimizer"])
  device = run.mesh.devices.flat[0]
  say(
    f"model      {c.model.name}: {model.num_layers} layers x"
    f" {model.hidden_size}, {model.num_heads} heads /"
    f" {model.num_kv_heads} KV heads, {model.vocab_size:,} tokens"
  )
  say(
    f"trainable  {trained:,} of {trained + frozen:,} parameters"
    f" ({trained / (trained + frozen):.2%}; adapter {c.adapter.name});"
    f" {_mib(trained_bytes)} trained, {_mib(frozen_bytes)} frozen,"
    f" {_mib(optimizer_bytes)} {c.optimizer.name} state"
  )
  say(f"devices    {run.mesh.size} x {device.device_kind} ({device.platform})")
  first, *more = corpus.summary.splitlines()
  say("\n".join([f"data       {first}", *(f"           {m}" for m in more)]))


def _mib(count: int) -> str:
  return f"{count / MEBIBYTE:,.1f} MiB"


class Log:
  """Fetches results one step behind, so that the device never waits.

  A value that is not finite raises FloatingPointError before its step can be
  saved.
  """

  def __init__(self, run: Any, metrics: Metrics):
    self._run, self._metrics = run, metrics
    self._progress: Progress | None = None
    self._pending: tuple[int, Any, int] | None = None
    self._initial: float | None = None
    self._clock = time.perf_counter()

  def start(self, first: int) -> None:
    """Shows progress from step `first` on, once for all processes."""
    if jax.process_index() == 0:
      self._progress = Progress(self._run.config.steps, first)

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *_) -> None:
    if self._progress:
      self._progress.close()

  def initial(self, eval_loss: float | None) -> None:
    """Takes the held-out loss before the first step."""
    self._initial = eval_loss
    if eval_loss is not None:
      say(f"held-out   {eval_loss:.4f} nats/token before training")

  def begin(self) -> None:
    """Starts the clock of a step that follows a pause."""
    if self._pending is None:
      self._clock = time.perf_counter()

  def add(self, step: int, results: Any, tokens: int) -> None:
    """Takes a step's results, still being computed; reports those before."""
    self.flush()
    self._pending = step, results, tokens

  def flush(self, evaluate: Callable[[], float | None] | None = None) -> None:
    """Reports what is pending, and what `evaluate` measures after it."""
    if self._pending is None:
      return
    (step, results, tokens), self._pending = self._pending, None
    values = jax.device_get(results)
    now = time.perf_counter()
    seconds, self._clock = now - self._clock, now
    check_finite(step, values)
    line = {
      "loss": float(values["loss"]),
      "tokens_per_second": tokens / seconds,
    }
    if step == 1 and self._initial is not None:
      # The loss of step 1 is that of the untrained model.
      self._metrics.write(0, **line, eval_loss=self._initial)
    if self._progress:
      self._progress.update(step, **line)
    line["gradient_norm"] = float(values["gradient_norm"])
    line["learning_rate"] = float(self._run.learning_rate(step - 1))
    if evaluate and (eval_loss := evaluate()) is not None:
      line["eval_loss"] = eval_loss
    self._metrics.write(step, **line)


def check_finite(step: int, values: dict[str, Any]) -> None:
  """Raises FloatingPointError, naming a tensor where the step looked for it.

  Args:
    step: the step that gave the values.
    values: the step's metrics, and `finite` by tensor with find_nonfinite.
  """
  names = ("loss", "gradient_norm", "update_norm")
  bad = [name for name in names if not np.isfinite(values[name])]
  if not bad:
    return
  where = "set find_nonfinite=True to learn which tensor is the first"
  if "finite" in values:
    tensors = [name for name, fine in values["finite"].items() if not fine]
    # A weight that is not finite spoils every gradient, not the reverse.
    tensors.sort(key=lambda name: name.startswith("gradient"))
    where = f"the first non-finite tensor is {(*tensors, 'none of them')[0]}"
  raise FloatingPointError(
    f"{bad[0]} is {values[bad[0]]} at step {step}; {where}"
  )


class Profile:
  """Traces a window of steps for TensorBoard and xprof.

  Args:
    folder: where the trace goes.
    start: first step of the window; the first of a run is 1.
    steps: length of the window; 0 traces nothing.
  """

  def __init__(self, folder: pathlib.Path, start: int, steps: int):
    self._folder = folder
    self._window = range(start, start + steps)
    self._active = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    if self._active:
      jax.profiler.stop_trace()

  def before(self, step: int) -> None:
    """Starts the trace if the step is in the window."""
    if step in self._window and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, results: Any) -> None:
    """Ends the trace once the window's last step is computed."""
    if self._active and step + 1 not in self._window:
      jax.block_until_ready(results)
      jax.profiler.stop_trace()
      self._active = False


def footer(run: Any, workdir: pathlib.Path, written: list[str]) -> None:
  """Prints the held-out losses and where the run wrote what."""
  losses = [
    line["eval_loss"]
    for line in read(workdir / "metrics.jsonl")
    if "eval_loss" in line
  ]
  if losses:
    say(f"held-out   {losses[0]:.4f} nats/token before, {losses[-1]:.4f} after")
  if jax.tree.leaves(run.model.split.frozen):
    say("frozen     weights are bit for bit what they were")
  say(f"written    {workdir}: {', '.join(written)}")
