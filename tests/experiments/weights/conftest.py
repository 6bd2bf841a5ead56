"""Models of the golden folders and their logits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.experiments.weights.pretrained import fill, load_pretrained
from adaptax.layers.decoder import Decoder
from adaptax.pallas_kernels.packed_attention import packed_attention


@pytest.fixture(scope="session")
def golden():
  return pathlib.Path(__file__).with_name("golden")


@pytest.fixture(scope="session")
def open_model():
  def open_model(name_or_path):
    config, weights = load_pretrained(name_or_path)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    fill(model, weights)
    return model

  return open_model


@pytest.fixture(scope="session")
def logits():
  """A function from a model and tokens (rows, T), one document a row."""

  def logits(model, tokens):
    tokens = jnp.asarray(tokens)
    start = jnp.zeros_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(q, k, v, **options):
      return packed_attention(q, k, v, start, backend="reference", **options)

    graphdef, state = nnx.split(model)
    apply = lambda state: nnx.merge(graphdef, state)(tokens, positions, attend)
    return np.asarray(jax.jit(apply)(state))

  return logits
