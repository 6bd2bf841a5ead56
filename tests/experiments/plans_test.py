"""Runs whose documents span devices, against one document at a time."""

import functools
import itertools

import jax
import numpy as np
import pytest

from adaptax.experiments import config as configs
from adaptax.experiments import data
from adaptax.experiments.plans import Greedy
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run
from adaptax.pallas_kernels.packed_attention import packed_attention
from adaptax.parallel import flat_mesh

TOKENS, DEVICES = 16, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Documents of 5 to 128 tokens, so over one to eight devices."""
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  for index, length in enumerate([126, 90, 60, *rng.integers(3, 40, 40)]):
    letters = rng.integers(97, 123, length).astype(np.uint8)
    (folder / f"{index:03}.txt").write_bytes(letters.tobytes())
  return data.load(
    name="text",
    path=str(folder),
    tokenizer=data.ByteTokenizer(),
    tokens_per_row=TOKENS * DEVICES,
    holdout=0.1,
  )


def make_run(**changes):
  config = configs.load("tiny")
  config.model.update(
    {"hidden_size": 32, "intermediate_size": 32, "num_heads": 8}
  )
  config.plan = {"name": "greedy", "tokens": TOKENS}
  config.optimizer = {"name": "sgd", "learning_rate": 0.1}
  config.update(changes)
  return Run(configs.check(config, REGISTRIES), flat_mesh())


def documents(arrays):
  """The documents of (micro_batches, N, T) arrays, from their buffers."""
  for micro in range(len(arrays["tokens"])):
    part = {name: array[micro] for name, array in arrays.items()}
    flat = {name: part[name].ravel() for name in ("tokens", "weights")}
    for device, slot in np.argwhere(part["positions"] == 0):
      stop, start = part["stop"][device, slot], part["start"][device, slot]
      begin = device * TOKENS + slot
      span = slice(begin, begin + stop - start)
      if flat["weights"][span].any():
        yield flat["tokens"][span]


def mean_loss(run, trainable, frozen, arrays):
  """Mean next-token loss of the documents, each alone in its row."""

  @functools.partial(jax.jit, static_argnums=1)
  def losses(tokens, size):
    model = run.module(trainable, frozen)
    start = np.zeros((1, size), np.int32)
    attend = functools.partial(packed_attention, start=start)
    positions = np.arange(size, dtype=np.int32)[None]
    return jax.nn.log_softmax(model(tokens[None], positions, attend)[0])

  total = count = 0
  for document in documents(arrays):
    size = TOKENS * DEVICES
    padded = np.pad(document, (0, size - len(document)))
    each = losses(padded, size)
    rows = np.arange(len(document) - 1)
    total -= np.asarray(each)[rows, document[1:]].sum()
    count += len(rows)
  return total / count


@pytest.mark.slow
def test_one_program_trains_on_layouts_of_every_mix(corpus):
  run = make_run()
  trainable, frozen = run.model.materialise()
  state = run.initial_state(trainable)
  step = run.train_step()
  batches = run.plan.train_batches(corpus, micro_batches=2, seed=0)
  degrees = set()
  for batch in itertools.islice(batches, 8):
    degrees |= set(batch.arrays["degree"].ravel().tolist())
    expected = mean_loss(
      run, jax.device_get(state["trainable"]), frozen, batch.arrays
    )
    state, metrics = step(state, frozen, run.place_batch(batch.arrays))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  assert degrees >= {1, 2, 8}
  assert step._cache_size() == 1


def test_evaluation_sees_every_held_out_document_once(corpus):
  run = make_run()
  batches = run.plan.eval_batches(corpus, windows=1000)
  arrays = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
  seen = sorted(map(bytes, map(np.uint8, (d[:-1] for d in documents(arrays)))))
  held_out = corpus.held_out
  assert seen == sorted(
    bytes(np.uint8(held_out[i].tokens[:-1])) for i in range(len(held_out))
  )


def test_batches_resume_bit_for_bit(corpus):
  plan = Greedy(tokens=TOKENS, devices=DEVICES, heads=8)
  batches = plan.train_batches(corpus, micro_batches=2, seed=0)
  for _ in range(3):
    next(batches)
  state = batches.get_state()
  expected = [next(batches).arrays for _ in range(3)]
  again = plan.train_batches(corpus, micro_batches=2, seed=0)
  again.set_state(state)
  for arrays in expected:
    for name, array in next(again).arrays.items():
      np.testing.assert_array_equal(array, arrays[name])


def test_the_longest_piece_is_what_devices_and_heads_allow():
  plan = functools.partial(Greedy, tokens=16, devices=8)
  assert plan(heads=8).longest == 128
  assert plan(heads=9).longest == 16
  assert plan(heads=9, ring=True).longest == 128
