"""One table between our tree and the tensor names of Hugging Face and GGUF.

Import, export and PEFT adapters all read it. Matrices are stored (out, in)
there and (in, out) here; a stacked leaf here is one tensor a layer there.
"""

from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from adaptax.layers.decoder import Decoder, DecoderConfig

Path = tuple[Any, ...]
Scheme = Literal["huggingface", "gguf"]

_HF = "model.layers.{}"
# Module here: module at Hugging Face and in GGUF; {} is the layer.
MODULES: dict[Path, dict[str, str]] = {
  tuple(ours.split("/")): {"huggingface": huggingface, "gguf": gguf}
  for ours, huggingface, gguf in (
    ("embed", "model.embed_tokens", "token_embd"),
    ("layers/attention_norm", f"{_HF}.input_layernorm", "blk.{}.attn_norm"),
    ("layers/attention/q", f"{_HF}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers/attention/k", f"{_HF}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers/attention/v", f"{_HF}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers/attention/o", f"{_HF}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers/mlp_norm", f"{_HF}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers/mlp/gate", f"{_HF}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers/mlp/up", f"{_HF}.mlp.up_proj", "blk.{}.ffn_up"),
    ("layers/mlp/down", f"{_HF}.mlp.down_proj", "blk.{}.ffn_down"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
  )
}
_LEAVES = {
  "kernel": "weight",
  "bias": "bias",
  "scale": "weight",
  "embedding": "weight",
}


class Stored(NamedTuple):
  """How a leaf of ours is stored: one name, or one a layer if stacked."""

  names: tuple[str, ...]
  shape: tuple[int, ...]
  stacked: bool
  transposed: bool


def stored(path: Path, shape: tuple[int, ...], scheme: Scheme) -> Stored:
  """Describes the tensors of the leaf at `path`, of `shape` in our tree."""
  *module, leaf = path
  template = f"{MODULES[tuple(module)][scheme]}.{_LEAVES[leaf]}"
  stacked, transposed = "{}" in template, leaf == "kernel"
  count = shape[0] if stacked else 1
  return Stored(
    names=tuple(template.format(layer) for layer in range(count)),
    shape=shape[stacked:][:: -1 if transposed else 1],
    stacked=stacked,
    transposed=transposed,
  )


def leaves(config: DecoderConfig) -> dict[Path, jax.ShapeDtypeStruct]:
  """The leaves of `Decoder(config)` by path, as shapes without memory."""
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {path: leaf.get_value() for path, leaf in flat}
