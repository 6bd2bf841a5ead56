"""A run's checkpoint becomes folders that give the trained model's logits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.experiments import config as configs
from adaptax.experiments import export
from adaptax.experiments.checkpoints import Checkpoints
from adaptax.experiments.fingerprint import fingerprint
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run
from adaptax.experiments.weights import peft
from adaptax.parallel import flat_mesh

TOKENS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def make_run(golden, tmp_path_factory):
  """Saves steps 3 and 7 of a run on a golden base, the leaves all changed."""

  def make_run(name):
    folder = tmp_path_factory.mktemp("export")
    base, root = folder / "base", folder / "run"
    shutil.copytree(golden / "llama", base)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "x"}')
    # One row a micro-batch keeps the run, and its export, on one device.
    overrides = {"plan.rows": "1", "model.name": "pretrained"}
    config = configs.check(
      configs.load(name), REGISTRIES, overrides | {"model.path": str(base)}
    )
    root.mkdir()
    (root / "config.json").write_text(configs.to_json(config))
    run = Run(config, flat_mesh(jax.devices()[:1]))
    trainable, frozen = run.model.materialise()
    with Checkpoints(root / "checkpoints", every=1, keep=2) as checkpoints:
      for step in (3, 7):
        state = run.initial_state(_changed(trainable, step))
        checkpoints.save(step, state, {"frozen": fingerprint(frozen)})
    model = lambda step: run.module(_changed(trainable, step), frozen)
    return root, base, model

  return make_run


@pytest.fixture(scope="module")
def lora_run(make_run):
  return make_run("tiny:lora")


def _changed(tree, step):
  change = lambda x: (
    x + 0.01 * step * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
  )
  return jax.tree.map(change, tree)


def test_both_folders_have_the_logits_of_the_newest_checkpoint(
  lora_run, open_model, logits, tmp_path
):
  root, base, model = lora_run
  before = sorted(path.name for path in root.rglob("*"))
  export.export(str(root), None, "both", str(tmp_path))
  assert sorted(path.name for path in root.rglob("*")) == before
  expected = logits(model(7), TOKENS)
  assert np.abs(expected - logits(model(3), TOKENS)).max() > 1e-2
  merged = open_model(tmp_path / "merged")
  np.testing.assert_allclose(logits(merged, TOKENS), expected, atol=1e-4)
  adapted = peft.load_adapter(
    tmp_path / "adapter", open_model(base), rngs=nnx.Rngs(0)
  )
  np.testing.assert_allclose(logits(adapted, TOKENS), expected, atol=1e-4)


def test_a_named_checkpoint_of_all_weights_is_exported(
  make_run, open_model, logits, tmp_path
):
  root, _, model = make_run("tiny")
  step = str(root / "checkpoints" / "3")
  for _ in range(2):  # The second time replaces the first one's folder.
    export.export(None, step, "hf", str(tmp_path / "out"))
  exported = open_model(tmp_path / "out")
  np.testing.assert_allclose(
    logits(exported, TOKENS), logits(model(3), TOKENS), atol=1e-4
  )
  # What lies beside the weights of the base comes along.
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert {"tokenizer_config.json", "generation_config.json"} < names
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, 2)


def test_a_base_that_has_changed_since_is_noticed(lora_run, tmp_path):
  root, base, _ = lora_run
  path = base / "model-00002-of-00002.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(ValueError, match="are not those that the run"):
    export.export(str(root), None, "peft", str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
  path.write_bytes(whole)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((None, None, "hf", "x"), "one of --workdir and --checkpoint"),
    (("a", "b", "hf", "x"), "one of --workdir and --checkpoint"),
    (("a", None, "hf", None), "give --output"),
    (("a", None, "hf", "x"), r"a is no run: it has no config\.json"),
  ],
)
def test_what_cannot_be_exported_is_said(
  monkeypatch, tmp_path, arguments, message
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    export.export(*arguments)


def test_files_of_others_are_noticed_before_any_work(tmp_path, monkeypatch):
  (tmp_path / "notes.txt").write_text("mine")
  monkeypatch.setattr(export, "read", None)
  with pytest.raises(FileExistsError, match="did not write"):
    export.export("a", None, "hf", str(tmp_path))
