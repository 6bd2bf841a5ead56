"""Named shapes of real models and packings, for tests and benchmarks."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
  """Attention of one layer of a published model."""

  heads: int
  kv_heads: int
  dim: int
  softcap: float | None = None
  window: int | None = None


CASES = {
  "smollm2_135m": Case(9, 3, 64),
  "qwen2.5_0.5b": Case(14, 2, 64),
  "phi3_mini": Case(32, 32, 96, window=2047),
  "llama_7b": Case(32, 32, 128),
  "llama3_8b": Case(32, 8, 128),
  "mistral_7b": Case(32, 8, 128, window=4096),
  "gemma_2b": Case(8, 1, 256),
  "gemma2_9b": Case(16, 8, 256, softcap=50.0, window=4096),
}


def pack(lengths, tokens):
  """`start` and `stop`, int32 (tokens,), of documents packed in a row.

  Args:
    lengths: tokens of each document, in order.
    tokens: size of the buffer; what is left of it is padding.
  """
  lengths = [*lengths, *[1] * (tokens - sum(lengths))]
  stop = np.cumsum(lengths, dtype=np.int32)
  return np.repeat(stop - lengths, lengths).astype(np.int32), np.repeat(
    stop, lengths
  )


def long_tailed_lengths(rng, tokens, median=1000, sigma=1.3):
  """Log-normal document lengths, as of source code, that fill a buffer."""
  lengths = []
  while (left := tokens - sum(lengths)) > 0:
    lengths.append(min(left, int(rng.lognormal(np.log(median), sigma)) + 1))
  return lengths
