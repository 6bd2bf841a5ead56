"""The metrics file, its event files, the progress line and the loss plot."""

import io
import json
import math
import os
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tensorboardX.proto import event_pb2

from adaptax.experiments import metrics


def _strict(text):
  """Parses JSON as the standard has it, without NaN and Infinity."""

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  return json.loads(text, parse_constant=refuse)


def _run(folder, steps):
  with metrics.Metrics(folder, tensorboard=False) as log:
    for step in steps:
      log.write(step, loss=math.sin(step), tokens_per_second=1e3 / step)


def _events(folder):
  """(tag or 'purge', step, value) of each record in the event files."""
  found = []
  for file in sorted(folder.iterdir()):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[12 + size + 4 :]
      if event.HasField("session_log"):
        found.append(("purge", event.step, None))
      found += [
        (v.tag, event.step, v.simple_value) for v in event.summary.value
      ]
  return found


class TestMetrics:
  def test_a_line_is_one_object_and_there_at_once(self, tmp_path):
    with metrics.Metrics(tmp_path / "new", tensorboard=False) as log:
      log.write(3, loss=np.float32(0.1), tokens=jnp.int32(7), eval_loss=2.5)
      text = (tmp_path / "new" / "metrics.jsonl").read_text()
      assert text.endswith("\n")
      line = _strict(text)
    assert line == {
      "step": 3,
      "loss": float(np.float32(0.1)),
      "tokens": 7,
      "eval_loss": 2.5,
    }
    assert type(line["tokens"]) is int

  @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
  def test_a_non_finite_value_is_null(self, tmp_path, value):
    with metrics.Metrics(tmp_path, tensorboard=False) as log:
      log.write(1, loss=value)
    assert _strict(log.path.read_text()) == {"step": 1, "loss": None}

  @pytest.mark.parametrize("killed_after", [4, 6, 9])
  def test_a_resumed_file_equals_an_uninterrupted_one(
    self, tmp_path, killed_after
  ):
    _run(tmp_path / "whole", range(1, 11))
    _run(tmp_path / "killed", range(1, killed_after + 1))
    path = tmp_path / "killed" / "metrics.jsonl"
    with path.open("a") as file:
      file.write('{"step": 77, "lo')
    with metrics.Metrics(tmp_path / "killed", tensorboard=False) as log:
      log.truncate(4)
      for step in range(5, 11):
        log.write(step, loss=math.sin(step), tokens_per_second=1e3 / step)
    whole = tmp_path / "whole" / "metrics.jsonl"
    assert path.read_bytes() == whole.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]

  def test_half_a_line_does_not_spoil_the_next(self, tmp_path):
    _run(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "loss": 1.')
    assert [line["step"] for line in metrics.read(path)] == [1]
    _run(tmp_path, [2])
    assert [line["step"] for line in metrics.read(path)] == [1, 2]

  def test_an_interrupted_truncation_loses_nothing(self, tmp_path, monkeypatch):
    _run(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = metrics.Metrics(tmp_path, tensorboard=False)

    def kill(*_):
      raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
      log.truncate(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before

  def test_other_processes_write_nothing(self, tmp_path):
    with metrics.Metrics(tmp_path / "other", primary=False) as log:
      log.truncate(3)
      log.write(1, loss=1.0)
    assert not (tmp_path / "other").exists()

  def test_tensorboard_gets_the_values_and_the_purge(self, tmp_path):
    with metrics.Metrics(tmp_path) as log:
      log.write(1, loss=0.5)
      log.write(2, loss=0.25, eval_loss=3.0)
      log.truncate(1)
      log.write(2, loss=0.125)
    assert _events(tmp_path / "tensorboard") == [
      ("loss", 1, 0.5),
      ("loss", 2, 0.25),
      ("eval_loss", 2, 3.0),
      ("purge", 2, None),
      ("loss", 2, 0.125),
    ]

  def test_tensorboard_may_be_absent(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with metrics.Metrics(tmp_path) as log:
      log.write(1, loss=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _train(stream, seconds_per_step, steps, total):
  clock = _Clock()
  with metrics.Progress(total, stream=stream, every=5.0, clock=clock) as line:
    clock.now += 60  # Compilation.
    for step in range(1, steps + 1):
      clock.now += seconds_per_step
      line.update(step, loss=1 / step, tokens_per_second=12345.6)


class TestProgress:
  def test_a_file_gets_a_line_every_few_seconds(self):
    stream = io.StringIO()
    _train(stream, 2.0, steps=10, total=10)
    lines = stream.getvalue().splitlines()
    # Six seconds lie between the lines of steps 1, 4 and 7.
    assert [line.split()[1] for line in lines] == [
      "1/10",
      "4/10",
      "7/10",
      "10/10",
    ]
    assert lines[1] == (
      "step  4/10  loss 0.2500  12,346 tokens/s  0:00:12 left"
    )
    assert "left" not in lines[0]

  def test_a_run_cut_short_still_shows_its_last_line(self):
    stream = io.StringIO()
    _train(stream, 2.0, steps=6, total=100)
    assert stream.getvalue().splitlines()[-1].startswith("step   6/100")

  def test_a_terminal_is_rewritten_in_place(self):
    stream = _Terminal()
    _train(stream, 2.0, steps=3, total=3)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    shown = [part for part in text.split("\r\x1b[K") if part]
    assert [part.split("/")[0] for part in shown] == [
      "step 1",
      "step 2",
      "step 3",
    ]

  def test_a_note_stands_on_a_line_of_its_own(self):
    stream = _Terminal()
    with metrics.Progress(9, stream=stream) as line:
      line.update(1, loss=1.0, tokens_per_second=1.0)
      line.note("held-out loss 3.0")
    assert "\r\x1b[Kheld-out loss 3.0\n" in stream.getvalue()

  def test_nothing_is_printed_without_a_step(self):
    stream = _Terminal()
    with metrics.Progress(9, stream=stream):
      pass
    assert stream.getvalue() == ""

  def test_time_left_follows_a_change_of_pace(self):
    clock, stream = _Clock(), io.StringIO()
    line = metrics.Progress(1000, stream=stream, every=0.0, clock=clock)
    for step in range(1, 200):
      clock.now += 1.0 if step < 100 else 3.0
      line.update(step, loss=1.0, tokens_per_second=1.0)
      if step == 99:
        assert stream.getvalue().endswith("0:15:01 left\n")
    # 801 steps at 3 seconds; a hundred steps have forgotten the old pace.
    assert stream.getvalue().endswith(("0:40:02 left\n", "0:40:03 left\n"))


class TestPlot:
  def _lines(self, tmp_path, monkeypatch):
    """Plots tmp_path/metrics.jsonl and returns the axes that were drawn."""
    drawn = []
    save = Figure.savefig

    def keep(figure, out):
      drawn.append(figure)
      save(figure, out)

    monkeypatch.setattr(Figure, "savefig", keep)
    metrics.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    return drawn[0].axes[0]

  def test_the_curves_are_those_of_the_file(self, tmp_path, monkeypatch):
    with metrics.Metrics(tmp_path, tensorboard=False) as log:
      log.write(0, eval_loss=3.0)
      for step in range(1, 9):
        log.write(step, loss=math.nan if step == 5 else 3 - 0.1 * step)
      log.write(8, eval_loss=2.5)
    axes = self._lines(tmp_path, monkeypatch)
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    steps = [s for s in range(1, 9) if s != 5]
    expected = np.array([(s, 3 - 0.1 * s) for s in steps])
    np.testing.assert_allclose(curves["training"], expected)
    np.testing.assert_allclose(curves["held-out"], [(0, 3.0), (8, 2.5)])
    assert curves["smoothed"].shape == expected.shape
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
      "step",
      "loss (nats/token)",
    )
    assert axes.get_title(loc="left") == (
      "Held-out loss 3.000 → 2.500 nats/token"
    )

  def test_it_is_a_png_of_a_readable_size(self, tmp_path, monkeypatch):
    _run(tmp_path, range(1, 4))
    axes = self._lines(tmp_path, monkeypatch)
    assert axes.get_title(loc="left").startswith("Training loss 0.841 → 0.141")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000
    assert height >= 600

  def test_one_evaluation_alone_is_drawn(self, tmp_path, monkeypatch):
    with metrics.Metrics(tmp_path, tensorboard=False) as log:
      log.write(5, eval_loss=2.0)
    axes = self._lines(tmp_path, monkeypatch)
    assert axes.get_title(loc="left") == "Held-out loss 2.000 nats/token"

  def test_no_loss_is_an_error(self, tmp_path):
    with metrics.Metrics(tmp_path, tensorboard=False) as log:
      log.write(1, loss=math.nan)
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no loss"):
      metrics.plot_losses(log.path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()

  @given(st.integers(1, 200), st.floats(-5, 5), st.floats(-1, 1))
  def test_smoothing_keeps_a_constant_and_the_middle_of_a_line(
    self, count, level, slope
  ):
    losses = level + slope * np.arange(count)
    smooth = metrics._smooth(losses)
    assert smooth.shape == losses.shape
    assert np.all(smooth >= losses.min() - 1e-9)
    assert np.all(smooth <= losses.max() + 1e-9)
    middle = count // 2
    if count % 2:
      np.testing.assert_allclose(smooth[middle], losses[middle], atol=1e-9)
    np.testing.assert_allclose(
      metrics._smooth(np.full(count, level)), level, atol=1e-9
    )
