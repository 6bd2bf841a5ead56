"""What a run reports: metrics.jsonl, TensorBoard, a progress line, loss.png."""

import datetime
import importlib.util
import json
import math
import os
import pathlib
import shutil
import sys
import time
from typing import Any, TextIO

import numpy as np


class Metrics:
  """Writes `workdir/metrics.jsonl`, and `workdir/tensorboard` if asked for.

  A resumed run calls `truncate` first and writes the line of a step before it
  saves that step's checkpoint; the file then holds the steps of an
  uninterrupted run, whenever it was killed.

  Args:
    workdir: made if it does not exist.
    tensorboard: also write event files, where tensorboardX is installed.
    primary: False on all processes but one, which then write nothing.
  """

  def __init__(
    self, workdir, *, tensorboard: bool = True, primary: bool = True
  ):
    folder = pathlib.Path(workdir)
    self.path = folder / "metrics.jsonl"
    self._primary = primary
    has_writer = importlib.util.find_spec("tensorboardX") is not None
    self._events = (
      folder / "tensorboard" if tensorboard and has_writer else None
    )
    self._writer: Any = None
    self._purge_step: int | None = None
    if primary:
      folder.mkdir(parents=True, exist_ok=True)
      self._file = self._rewritten(math.inf)

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, **values: float) -> None:
    """Appends one line, for others to read at once; non-finite is null."""
    if not self._primary:
      return
    numbers = {name: np.asarray(value).item() for name, value in values.items()}
    finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
    self._file.flush()
    if self._events is not None:
      if self._writer is None:
        self._writer = _event_writer(self._events, self._purge_step)
      for name, number in numbers.items():
        self._writer.add_scalar(name, number, int(step))

  def truncate(self, step: int) -> None:
    """Drops the lines of steps above `step`, all or none of them."""
    if self._primary:
      self.close()
      self._writer, self._purge_step = None, step + 1
      self._file = self._rewritten(step)

  def close(self) -> None:
    if self._primary:
      self._file.close()
      if self._writer is not None:
        self._writer.close()

  def _rewritten(self, last: float) -> TextIO:
    """Keeps the whole lines up to step `last`; returns the file to append to."""
    if self.path.exists():
      kept = [line for line in read(self.path) if line["step"] <= last]
      draft = self.path.with_suffix(".jsonl.tmp")
      draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
      os.replace(draft, self.path)
    return self.path.open("a")


def _event_writer(folder: pathlib.Path, purge_step: int | None) -> Any:
  import tensorboardX

  # Without the suffix, two writers within a second share one file name.
  return tensorboardX.SummaryWriter(
    str(folder),
    purge_step=purge_step,
    flush_secs=10,
    filename_suffix=f".{time.time_ns()}",
  )


def read(path) -> list[dict[str, Any]]:
  """The lines of a metrics file; one cut off by a kill is left out."""
  with open(path) as file:
    return [json.loads(line) for line in file if line.endswith("\n")]


class Progress:
  """The one progress line: step, loss, tokens/s and time left.

  A terminal shows it rewritten in place; a file gets a new line at most every
  few seconds, and always the last one.

  Args:
    total: number of steps of the whole run.
    start: step that a resumed run starts from.
    stream: where to write, standard output by default.
    every: seconds between two lines where `stream` is not a terminal.
    clock: seconds, for tests.
  """

  def __init__(
    self,
    total: int,
    start: int = 0,
    *,
    stream: TextIO | None = None,
    every: float = 5.0,
    clock=time.monotonic,
  ):
    self._total, self._start, self._clock = total, start, clock
    self._stream = stream or sys.stdout
    self._in_place = self._stream.isatty()
    self._every = 0.1 if self._in_place else every
    self._line, self._shown, self._shown_at = "", "", -math.inf
    self._last = start, clock()
    self._pace: float | None = None

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Takes the figures of the step that has just been done."""
    now = self._clock()
    self._time_step(step, now)
    self._line = (
      f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:.4f}"
      f"  {tokens_per_second:,.0f} tokens/s{self._time_left(step)}"
    )
    if now - self._shown_at >= self._every or step >= self._total:
      self._show(now)

  def note(self, text: str) -> None:
    """Writes a line of its own above the progress line."""
    self._erase()
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Shows the last line if it was held back, and ends it."""
    if self._line != self._shown:
      self._show(self._clock())
    if self._in_place and self._shown:
      print(file=self._stream, flush=True)
    self._line = self._shown = ""

  def _time_step(self, step: int, now: float) -> None:
    """Smooths seconds a step; the first one compiles and does not count."""
    before, then = self._last
    if step > before > self._start:
      pace = (now - then) / (step - before)
      self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
    self._last = step, now

  def _time_left(self, step: int) -> str:
    if self._pace is None:
      return ""
    seconds = round(self._pace * max(self._total - step, 0))
    return f"  {datetime.timedelta(seconds=seconds)} left"

  def _show(self, now: float) -> None:
    if self._in_place:
      self._erase()
      width = shutil.get_terminal_size().columns - 1
      print(self._line[:width], end="", file=self._stream, flush=True)
    else:
      print(self._line, file=self._stream, flush=True)
    self._shown, self._shown_at = self._line, now

  def _erase(self) -> None:
    if self._in_place:
      print("\r\x1b[K", end="", file=self._stream)


def plot_losses(path, out) -> None:
  """Draws the losses of a metrics file, in nats/token over steps, as a PNG.

  Raises:
    ValueError: the file holds no loss.
  """
  from matplotlib.figure import Figure

  lines = read(path)
  train, held_out = _curve(lines, "loss"), _curve(lines, "eval_loss")
  if not len(train[0]) + len(held_out[0]):
    raise ValueError(f"{path} holds no loss to plot")
  figure = Figure(figsize=(8, 4.5), dpi=150)
  figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
  axes = figure.add_subplot()
  if len(train[0]):
    axes.plot(*train, color="#b3cbe3", lw=0.7, label="training")
    smooth = train[0], _smooth(train[1])
    axes.plot(*smooth, color="#1f5a96", lw=1.8, label="smoothed")
  if len(held_out[0]):
    axes.plot(*held_out, "o-", color="#d1601f", ms=5, lw=1.2, label="held-out")
  axes.set_title(_title(train[1], held_out[1]), loc="left", fontsize=12)
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats/token)")
  axes.locator_params(axis="x", integer=True)
  axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.02)
  # Above the axes, where it cannot hide a curve.
  axes.legend(
    frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.99)
  )
  figure.savefig(out)


def _title(train, held_out) -> str:
  name, losses = (
    ("Held-out", held_out) if len(held_out) else ("Training", train)
  )
  if len(losses) == 1:
    return f"{name} loss {losses[0]:.3f} nats/token"
  return f"{name} loss {losses[0]:.3f} → {losses[-1]:.3f} nats/token"


def _curve(lines, name: str) -> tuple[np.ndarray, np.ndarray]:
  points = [(p["step"], p[name]) for p in lines if p.get(name) is not None]
  steps, losses = np.array(points, float).reshape(-1, 2).T
  return steps, losses


def _smooth(losses: np.ndarray) -> np.ndarray:
  """Gaussian mean over about a tenth of the run, cut off at its ends."""
  width = max(len(losses) / 25, 1.0)
  reach = min(round(3 * width), len(losses) - 1)
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
  sums, weights = (
    np.convolve(x, kernel)[reach : reach + len(losses)]
    for x in (losses, np.ones_like(losses))
  )
  return sums / weights
