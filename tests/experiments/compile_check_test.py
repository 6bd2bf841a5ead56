"""The real train step, compiled: what its collectives move, whether it fits."""

import collections
import importlib.util
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from adaptax.experiments import compile_check, data
from adaptax.experiments import config as configs
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run
from adaptax.parallel import flat_mesh, hlo

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install libtpu",
)

LAYERS, VOCAB = 3, 512


def make(name, **overrides):
  changes = {
    "model.num_layers": LAYERS,
    "model.vocab_size": VOCAB,
    "model.remat": "attention",
    **{key.replace("__", "."): value for key, value in overrides.items()},
  }
  texts = {key: str(value) for key, value in changes.items()}
  return configs.check(configs.load(name), REGISTRIES, texts)


def lower(run):
  frozen = run.model.split.frozen
  return run.train_step().lower(run.state, frozen, run.abstract_batch())


def moved(run, module, *kinds):
  """How often each matrix, by its sorted shape, is moved in a step."""
  found = collections.Counter()
  for computation, times, _, _ in module.runs():
    for instruction in computation.values():
      if instruction.opcode.removesuffix("-start") in kinds:
        for array in instruction.arrays:
          if math.prod(array.dims) > run.config.model.hidden_size:
            found[tuple(sorted(s for s in array.dims if s > 1))] += times
  return found


def matrices(tree, times):
  """The matrices of blocks, `times` of each layer's, and those at the ends."""
  found = collections.Counter()
  for leaf in jax.tree.leaves(tree):
    if len(leaf.shape) == 3:
      found[tuple(sorted(leaf.shape[1:]))] += LAYERS * times
    elif VOCAB in leaf.shape:
      found[tuple(sorted(leaf.shape))] += 1
  return found


def assert_moves_are_fsdp(run, module):
  """Weights to use them, forward and backward, their gradients, no more."""
  trainable, frozen = run.state["trainable"], run.model.split.frozen
  assert moved(run, module, "all-gather") == matrices((trainable, frozen), 2)
  gradients = matrices(trainable, 1)
  if run.config.adapter.name == "none":
    # That of the head is reduced once a chunk of the loss.
    chunks = run.config.plan.tokens // run.config.loss_chunk
    head = run.config.model.hidden_size, VOCAB
    gradients[tuple(sorted(head))] += chunks - 1
  assert moved(run, module, "all-reduce", "reduce-scatter") == gradients
  others = set(hlo.COLLECTIVES) - {"all-gather", "all-reduce", "reduce-scatter"}
  assert not moved(run, module, *others)


@pytest.mark.parametrize("name", ["tiny", "tiny:lora"])
def test_the_step_moves_weights_and_gradients_and_no_activations(name):
  # Four KV heads, since the update of two would be too small to be cut.
  config = make(name, model__num_kv_heads=4, plan__tokens=48, loss_chunk=24)
  run = Run(config, flat_mesh())
  assert_moves_are_fsdp(run, hlo.Module(lower(run).compile().as_text()))


@pytest.fixture
def quick_compiler():
  level = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", "O1")
  yield
  jax.config.update("jax_optimization_level", level)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["llama_7b_full", "llama_7b_lora"])
def test_so_it_does_on_tpus(name, quick_compiler):
  config = make(
    name,
    model__hidden_size=1024,
    model__intermediate_size=2048,
    model__num_heads=8,
    model__num_kv_heads=8,
    plan__tokens=384,
    plan__rows=4,
    loss_chunk=128,
  )
  report = compile_check.check(config, "v5p:2x2x1")
  run = Run(config, flat_mesh(report.target.devices))
  assert report.fits
  assert_moves_are_fsdp(run, report.module)
  # libtpu leaves small gradients to all-reduces.
  if name == "llama_7b_full":
    scattered = report.collectives["reduce-scatter"].bytes
    assert scattered > 5 * report.collectives["all-reduce"].bytes


@pytest.mark.parametrize("plan", ["pack", "greedy"])
def test_the_abstract_batch_is_what_is_placed(plan, tmp_path):
  for index in range(20):
    (tmp_path / f"{index}.txt").write_text("text " * (index + 1))
  config = make("tiny", plan__name=plan, batch_size__micro_batches=2)
  run = Run(config, flat_mesh())
  corpus = data.load(
    name="text",
    path=str(tmp_path),
    tokenizer=data.ByteTokenizer(),
    tokens_per_row=run.plan.longest,
  )
  batches = run.plan.train_batches(corpus, micro_batches=2, seed=0)
  placed = run.place_batch(next(batches).arrays)
  facts = lambda x: (x.shape, x.dtype, x.sharding)
  assert jax.tree.map(facts, placed) == jax.tree.map(
    facts, run.abstract_batch()
  )


@pytest.mark.parametrize(
  "changes, products",
  [
    ({}, {"tpu": 2 + 7, "cuda": 2 + 5}),
    ({"model__remat": "full"}, {"tpu": 2 + 2 + 7, "cuda": 2 + 2 + 5}),
    ({"model__sliding_window": 50}, {"tpu": 9}),
    ({"model__sliding_window": 500}, {"tpu": 9}),
    ({"plan__name": "greedy", "batch_size__micro_batches": 3}, {"tpu": 9}),
  ],
)
def test_attention_is_counted_pair_by_pair(changes, products):
  run = Run(make("tiny", **changes), flat_mesh())
  index = np.arange(run.plan.longest)
  distance = index[:, None] - index
  window = changes.get("model__sliding_window", len(index))
  pairs = np.sum((distance >= 0) & (distance < window))
  rows = 8 * 128 * changes.get("batch_size__micro_batches", 1) // len(index)
  for platform, count in products.items():
    expected = 2 * 16 * 4 * LAYERS * count * rows * int(pairs)
    assert compile_check.attention_flops(run, platform) == expected


@pytest.mark.parametrize(
  "topology, message",
  [
    (None, "--topology is missing: name one, such as v5p:4x4x4"),
    ("v5p:4x4x4x4", "unknown topology 'v5p:4x4x4x4': did you mean v5p:4x4x4"),
  ],
)
def test_a_bad_topology_is_named_before_any_work(topology, message):
  with pytest.raises(ValueError, match=message):
    compile_check.check(make("tiny"), topology)


def run_binary(*arguments):
  command = sys.executable, "-m", "adaptax.experiments.compile_check"
  done = subprocess.run([*command, *arguments], capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def test_errors_are_one_line_and_a_status():
  status, out, error = run_binary("--config=tiny", "--topology=v7:2x2")
  assert (status, out) == (1, "")
  assert error.startswith("compile_check: unknown chip 'v7'")
  assert error.count("\n") == 1


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("rows, status", [(8, 0), (1 << 20, 1)])
def test_the_status_says_whether_it_fits(rows, status):
  arguments = "--config=tiny", f"--config.plan.rows={rows}"
  found, out, error = run_binary(*arguments, "--topology=v5e:2x2")
  assert (found, error) == (status, "")
  assert ("DOES NOT FIT" in out) == (status == 1)
  for word in ("arguments", "peak", "all-gather", "FLOPs", "ESTIMATE"):
    assert word in out
