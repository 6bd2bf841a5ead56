"""Trains a model: all of its weights, or adapters on frozen ones.

  python -m adaptax.experiments.train \
      --config=experiments/configs/finetune_smollm2.py --workdir=DIR

Any value of the config is overridden by --config.key=value. A work dir that
holds checkpoints of the same config is resumed. The exit status is 0 when the
run is complete and `PREEMPTED` when SIGTERM stopped it after a save.
"""

import functools
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptax.experiments import config as configs
from adaptax.experiments import data, report
from adaptax.experiments.checkpoints import Checkpoints, fingerprint
from adaptax.experiments.metrics import Metrics, plot_losses
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run
from adaptax.experiments.weights.peft import save_adapter
from adaptax.experiments.weights.pretrained import HUB
from adaptax.layers.adapters.base import AdapterBuffer, AdapterParam
from adaptax.parallel import flat_mesh

PREEMPTED = 75

# Keys that change what a run reports or keeps, and nothing that it computes.
REPORTING = ("checkpoint", "profile", "find_nonfinite", "tensorboard")

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written.")
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, for runs on several hosts."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
PROCESS = flags.DEFINE_integer("process", None, "This process, from 0.")


def main(config: Any) -> None:
  # absl sets INFO where the user asked for nothing.
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if COORDINATOR.value:
    jax.distributed.initialize(
      COORDINATOR.value, PROCESSES.value, PROCESS.value
    )
  try:
    workdir = check_workdir(WORKDIR.value, config)
    run = Run(config, flat_mesh())
    corpus = load_data(run)
  except (ValueError, OSError) as error:
    if logging.level_debug():
      raise
    sys.exit(f"train: {error}")
  report.header(run, corpus)
  try:
    sys.exit(train(run, corpus, workdir))
  except (FloatingPointError, OSError, ValueError) as error:
    if logging.level_debug():
      raise
    sys.exit(f"train: {error}")


def check_workdir(workdir: str | None, config: Any) -> pathlib.Path:
  """Returns the folder if it is new or holds a run of this config."""
  if not workdir:
    raise ValueError("--workdir is missing: name a folder to write to")
  if "://" in workdir:
    raise ValueError(f"--workdir {workdir} is no path: mount it as a folder")
  folder = pathlib.Path(workdir).absolute()
  if (path := folder / "config.json").exists():
    there = configs.from_json(path.read_text(encoding="utf-8"))
    if lines := configs.difference(there, config, REPORTING):
      raise ValueError(
        f"{folder} holds a run of another config: {'; '.join(lines)}"
      )
  return folder


def load_data(run: Run) -> data.Data:
  """Reads and tokenises the documents that the config names."""
  section = configs.build(run.config.data, REGISTRIES["data"])
  tokenizer = data.load_tokenizer(section.pop("tokenizer"), run.source.path)
  if tokenizer.vocab_size > run.source.config.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary"
      f" only {run.source.config.vocab_size}"
    )
  return data.load(
    name=run.config.data.name,
    tokenizer=tokenizer,
    tokens_per_row=run.plan.longest,
    **section,
  )


def train(run: Run, corpus: data.Data, workdir: pathlib.Path) -> int:
  """Runs to the last step or to SIGTERM; returns the exit status."""
  c, stop = run.config, StopSignal()
  write_config(workdir, c)
  trainable, frozen = run.model.materialise()
  proof = fingerprint(frozen)
  state = run.initial_state(trainable)
  batches = run.plan.train_batches(
    corpus, micro_batches=run.micro_batches, seed=c.seed
  )
  first = 0
  with (
    Checkpoints(workdir / "checkpoints", **c.checkpoint) as checkpoints,
    Metrics(
      workdir, tensorboard=c.tensorboard, primary=jax.process_index() == 0
    ) as metrics,
    report.Log(run, metrics) as log,
    report.Profile(workdir / "profile", **c.profile) as profile,
  ):
    found = checkpoints.restore(run.state)
    if found is not None:
      first, state, position = found
      same_bytes(position["frozen"], proof, "are not those of the saved run")
      batches.set_state(position["data"])
      report.say(f"resumed    at step {first}")
    # A run that restarts from nothing writes the line of step 0 again.
    metrics.truncate(first or -1)
    evaluation = Evaluation(run, corpus, frozen)
    log.start(first)
    if first == 0:
      log.initial(evaluation(state["trainable"]))
    train_step = run.train_step()
    step = first
    for step in range(first + 1, c.steps + 1):
      log.begin()
      profile.before(step)
      batch = next(batches)
      arrays = run.place_batch(batch.arrays)
      state, results = train_step(state, frozen, arrays)
      log.add(step, results, int(batch.lengths.sum()))
      profile.after(step, results)
      last, stopped = step == c.steps, stop.requested(step)
      if last or (c.eval.every and step % c.eval.every == 0):
        log.flush(functools.partial(evaluation, state["trainable"]))
      if last or stopped or checkpoints.due(step):
        log.flush()
        position = {"data": batches.get_state(), "frozen": proof}
        checkpoints.save(step, state, position)
      if stopped:
        break
  if step < c.steps:
    report.say(f"SIGTERM: saved step {step}; run again to go on")
    return PREEMPTED
  same_bytes(proof, fingerprint(frozen), "changed during the run")
  finish(run, workdir, state["trainable"], frozen)
  return 0


def write_config(workdir: pathlib.Path, config: Any) -> None:
  """Writes config.json, whole or not at all."""
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / "config.json.partial"
  with partial.open("w", encoding="utf-8") as file:
    file.write(configs.to_json(config))
    file.flush()
    os.fsync(file.fileno())
  partial.rename(workdir / "config.json")


class Evaluation:
  """The mean held-out loss in nats a token, over the same windows each time."""

  def __init__(self, run: Run, corpus: data.Data, frozen: Any):
    batches = run.plan.eval_batches(corpus, run.config.eval.windows)
    self._batches = [run.place_batch(arrays) for arrays in batches]
    self._step, self._frozen = run.eval_step(), frozen

  def __call__(self, trainable: Any) -> float | None:
    """Returns None where nothing is held out."""
    if not self._batches:
      return None
    results = [
      self._step(trainable, self._frozen, batch) for batch in self._batches
    ]
    loss, weight = (sum(map(float, column)) for column in zip(*results))
    return loss / weight


class StopSignal:
  """Turns SIGTERM into a question asked between steps."""

  def __init__(self):
    self._received = False
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._receive)

  def _receive(self, *_):
    self._received = True

  def requested(self, step: int) -> bool:
    """Whether all processes are to stop after this step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received


def same_bytes(old: dict, new: dict, problem: str) -> None:
  """Raises if frozen weights are not bit for bit what they were."""
  for name in old.keys() | new.keys():
    if old.get(name) != new.get(name):
      raise ValueError(f"the frozen weights {problem}: first in {name}")


def finish(run: Run, workdir: pathlib.Path, trainable, frozen) -> None:
  """Draws the losses, exports the adapter and says where things are."""
  model = run.module(trainable, frozen)
  if jax.process_count() > 1:
    gather_adapters(model, run.mesh)
  if jax.process_index():
    return
  plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
  written = ["metrics.jsonl", "config.json", "checkpoints", "loss.png"]
  if run.config.adapter.name != "none":
    base = HUB.get(run.config.model.name) or run.source.path
    try:
      save_adapter(workdir / "adapter", model, base and str(base))
      written.append("adapter")
    except ValueError as error:
      report.say(f"no adapter folder: {error}")
  report.footer(run, workdir, written)


def gather_adapters(model: nnx.Module, mesh: Mesh) -> None:
  """Gives every process the whole of the adapters' arrays."""
  state = nnx.state(model, nnx.Any(AdapterParam, AdapterBuffer))
  whole = NamedSharding(mesh, PartitionSpec())
  state = jax.jit(lambda x: x, out_shardings=whole)(state)
  nnx.update(model, jax.tree.map(jnp.asarray, jax.device_get(state)))


if __name__ == "__main__":
  app.run(main, flags_parser=configs.flags_parser(REGISTRIES))
