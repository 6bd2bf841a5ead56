"""What we write loads in the real transformers and PEFT, with our logits."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.experiments.weights.peft import save_adapter
from adaptax.experiments.weights.pretrained import save_pretrained
from adaptax.layers.adapters import LoRA, adapt, adapters, merge

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = np.arange(40).reshape(2, 20)
METHODS = {
  "lora": {},
  "rslora": {"use_rslora": True},
  "dora": {"use_dora": True},
  "pissa": {"init": "pissa"},
  "olora": {"init": "olora", "use_rslora": True},
  "pissa_dora": {"init": "pissa", "use_dora": True},
}


@torch.no_grad()
def _logits(model):
  return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def _load(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )


def _trained(base, options):
  """The base with adapters of two ranks and noise on their leaves."""
  method = functools.partial(LoRA, alpha=5, **options)
  rules = {
    "q|down": functools.partial(method, rank=4),
    "v": functools.partial(method, rank=2),
  }
  model = adapt(base, rules, rngs=nnx.Rngs(0))
  random = np.random.default_rng(0)
  for _, adapter, _ in adapters(model):
    for leaf in (adapter.a, adapter.b, adapter.magnitude):
      if leaf is not None:
        noise = 0.1 * random.standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(leaf[...] + noise, leaf.dtype))
  return model


@pytest.mark.parametrize(
  "name", ["llama", "llama3_tied", "qwen2", "mistral", "gemma"]
)
def test_transformers_loads_our_folder(
  golden, open_model, logits, tmp_path, name
):
  model = open_model(golden / name)
  save_pretrained(tmp_path / "out", model, shard_bytes=30000)
  np.testing.assert_allclose(
    _logits(_load(tmp_path / "out")), logits(model, TOKENS), atol=1e-4
  )


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_our_adapter(golden, open_model, logits, tmp_path, name):
  base = open_model(golden / "llama")
  model = _trained(base, METHODS[name])
  save_adapter(tmp_path / "adapter", model, str(golden / "llama"))
  theirs = peft.PeftModel.from_pretrained(
    _load(golden / "llama"), tmp_path / "adapter"
  )
  expected = logits(model, TOKENS)
  assert np.abs(expected - logits(base, TOKENS)).max() > 0.1
  np.testing.assert_allclose(_logits(theirs), expected, atol=1e-4)
  save_pretrained(tmp_path / "merged", merge(model))
  np.testing.assert_allclose(
    _logits(_load(tmp_path / "merged")), expected, atol=1e-4
  )
