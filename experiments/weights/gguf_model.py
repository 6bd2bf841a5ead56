"""A `DecoderConfig` and Hugging Face ordered tensors out of a GGUF file."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from adaptax.experiments.weights.gguf import GGUF
from adaptax.layers.decoder import DecoderConfig
from adaptax.layers.rope import RopeScaling
from adaptax.pallas_kernels.errors import unknown_name

_ARCHITECTURES = ("llama", "qwen2")


class Tensor(Protocol):
  """What importers read: a shape now, the values on demand."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  def load(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Mapped:
  """A tensor whose values pass through a shape-preserving function."""

  tensor: Tensor
  function: Callable[[np.ndarray], np.ndarray]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape

  def load(self) -> np.ndarray:
    return self.function(self.tensor.load())


def from_gguf(file: GGUF) -> DecoderConfig:
  """Reads the metadata of a llama (also Mistral) or qwen2 model.

  Raises:
    ValueError: another architecture, a missing key or an unknown RoPE scaling.
  """
  metadata, tensors = file.metadata, file.tensors
  kind = metadata.get("general.architecture", "")
  if kind not in _ARCHITECTURES:
    raise unknown_name("GGUF architecture", kind, _ARCHITECTURES)

  def value(key: str, default: Any = None) -> Any:
    found = metadata.get(f"{kind}.{key}", default)
    if found is None:
      raise ValueError(f"the GGUF metadata lacks {kind}.{key}")
    return found

  heads, hidden = value("attention.head_count"), value("embedding_length")
  head_dim = value("attention.key_length", hidden // heads)
  if value("rope.dimension_count", head_dim) != head_dim:
    raise ValueError("the GGUF model rotates a part of each head only")
  return DecoderConfig(
    vocab_size=len(metadata.get("tokenizer.ggml.tokens", ()))
    or value("vocab_size"),
    hidden_size=hidden,
    intermediate_size=value("feed_forward_length"),
    num_layers=value("block_count"),
    num_heads=heads,
    num_kv_heads=value("attention.head_count_kv", heads),
    head_dim=head_dim,
    context=value("context_length"),
    rope_theta=value("rope.freq_base", 10000.0),
    rope_scaling=_rope_scaling(value("rope.scaling.type", "none"), value),
    # Stored in float32, so that 1e-5 comes back as 9.99999975e-06.
    norm_eps=float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
    tie_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    out_bias="blk.0.attn_output.bias" in tensors,
  )


def _rope_scaling(kind: str, value) -> RopeScaling | None:
  if kind == "none":
    return None
  if kind != "linear":
    raise unknown_name("GGUF RoPE scaling", kind, ["none", "linear"])
  return RopeScaling("linear", factor=value("rope.scaling.factor"))


def half_split(file: GGUF, config: DecoderConfig) -> dict[str, Tensor]:
  """The tensors of a file with the rows of q and k as Hugging Face has them.

  llama.cpp's converter interleaves the two halves of every llama head, so that
  RoPE turns neighbours; ours turns halves, as transformers does.
  """
  tensors: dict[str, Tensor] = dict(file.tensors)
  if file.metadata["general.architecture"] != "llama":
    return tensors
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
  for name, tensor in tensors.items():
    for part, count in heads.items():
      if f".{part}." in name:
        tensors[name] = Mapped(tensor, functools.partial(_unpermute, count))
  return tensors


def _unpermute(heads: int, values: np.ndarray) -> np.ndarray:
  split = values.reshape(heads, -1, 2, *values.shape[1:])
  return split.swapaxes(1, 2).reshape(values.shape)
