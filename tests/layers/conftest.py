"""What the tests of models and adapters share."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptax.layers import Decoder, DecoderConfig
from adaptax.pallas_kernels.packed_attention import packed_attention


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
  """Programs this small take longer to optimise than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


class Tiny:
  """A small decoder with random weights and a packed batch for it."""

  config = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
  )

  def __init__(self):
    rng = np.random.default_rng(0)
    rows, length, second = 8, 12, 5
    start = np.where(np.arange(length) < second, 0, second)
    positions = np.arange(length) - start
    self.batch = {
      "tokens": rng.integers(0, 64, (rows, length), dtype=np.int32),
      "positions": np.tile(positions, (rows, 1)).astype(np.int32),
      "start": np.tile(start, (rows, 1)).astype(np.int32),
    }

    def logits(graphdef, state, batch):
      return self.forward(nnx.merge(graphdef, state), batch)

    self._logits = jax.jit(logits, static_argnums=0)

  def model(self, **changes: Any) -> Decoder:
    """Returns a decoder of the tiny config with `changes`."""
    fields = {**vars(self.config), "head_dim": None, **changes}
    config = DecoderConfig(**fields)
    return filled(lambda: Decoder(config, rngs=nnx.Rngs(0)))

  def logits(self, model: nnx.Module) -> np.ndarray:
    """Returns float32 logits; models of equal structure compile once."""
    logits = self._logits(*nnx.split(model), self.batch)
    return np.asarray(logits.astype(jnp.float32))

  @staticmethod
  def forward(model: Decoder, batch: dict[str, Any]) -> jax.Array:
    """Returns the logits (rows, T, vocab) of a packed batch."""

    def attend(q, k, v, **options):
      return packed_attention(q, k, v, batch["start"], **options)

    return model(batch["tokens"], batch["positions"], attend)


def filled(make: Callable[[], Any]) -> Any:
  """Makes a model with normal weights, without running its initialisers."""
  graphdef, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
  return nnx.merge(graphdef, jax.tree.map(fill, state))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
  return Tiny()


@pytest.fixture(scope="session")
def equations():
  """A function that lists all equations of what a function traces to."""
  return lambda function, *args: list(
    _equations(jax.make_jaxpr(function)(*args).jaxpr)
  )


def _equations(jaxpr) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)
