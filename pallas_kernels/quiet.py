"""Keeps what compiled libraries write to the standard error stream off it.

It stands here, without jax, because importing jax can be what writes.
"""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Discards the standard error stream, also that of C++ code."""
  sys.stderr.flush()
  kept = os.dup(2)
  try:
    with open(os.devnull, "w") as sink:
      os.dup2(sink.fileno(), 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
