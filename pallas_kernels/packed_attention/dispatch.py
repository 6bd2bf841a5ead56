"""Picks a backend for the target platform, and differentiates through it."""

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from adaptax.pallas_kernels.errors import unknown_name
from adaptax.pallas_kernels.packed_attention import groups, reference, tpu, xla

_MODULES = {"reference": reference, "xla": xla, "tpu": tpu}
BACKENDS = ("auto", *_MODULES)


class Options(NamedTuple):
  """What is static of an attention call; no document is longer than `row`."""

  scale: float
  softcap: float | None
  backend: str
  block_q: int | None
  block_kv: int | None
  row: int


def _blocks(options, backend, platform, q, k):
  """Block lengths, as the caller gave them or as the backend likes them."""
  if backend == "tpu":
    heads, tokens, dim = q.shape
    defaults = tpu.default_blocks(heads, k.shape[0], tokens, dim)
  else:
    defaults = (xla.default_block(options.row, platform),) * 2
  return options.block_q or defaults[0], options.block_kv or defaults[1]


def _tpu_problem(options, q, k):
  blocks = _blocks(options, "tpu", "tpu", q, k)
  return tpu.problem(q.shape[0] // k.shape[0], *q.shape[1:], *blocks)


def check(options, q, k):
  """Raises ValueError if the backend is unknown or cannot take the sizes."""
  if options.backend not in BACKENDS:
    raise unknown_name("backend", options.backend, BACKENDS)
  problem = _tpu_problem(options, q, k)
  if options.backend == "tpu" and problem:
    raise ValueError(f"backend 'tpu': {problem}")


def _choose(options, platform, q, k):
  """The backend that "auto" means on a platform."""
  if options.backend != "auto":
    return options.backend
  if platform == "tpu" and not _tpu_problem(options, q, k):
    return "tpu"
  if platform == "cpu":
    dense = options.row <= 128
  else:
    # A loop keeps a GPU less busy, so afford up to 256 MB of scores.
    dense = q.shape[0] * q.shape[1] * options.row <= 1 << 26
  return "reference" if dense else "xla"


def _on_platform(name, options, platform, start, stop, degree, q, k, *arrays):
  """Runs the pass `name`, "forward" or "backward", where `platform` is best."""
  backend, arrays = _choose(options, platform, q, k), (q, k, *arrays)
  settings = {"scale": options.scale, "softcap": options.softcap}
  if backend != "reference":
    blocks = _blocks(options, backend, platform, q, k)
    settings |= zip(("block_q", "block_kv"), blocks)
  run = functools.partial(getattr(_MODULES[backend], name), **settings)
  if backend == "tpu":
    interpret = platform != "tpu"
    return run(start, stop, degree, *arrays, interpret=interpret)
  if backend == "reference" and options.row <= q.shape[1]:
    run = functools.partial(groups.by_row, run, options.row)
  return groups.by_degree(run, start, degree, *arrays)


def _run(name, options, *operands):
  """Leaves the platform open until lowering: it may be absent hardware."""
  on = lambda platform: functools.partial(_on_platform, name, options, platform)
  return jax.lax.platform_dependent(
    *operands, cpu=on("cpu"), tpu=on("tpu"), default=on("gpu")
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(options, start, stop, degree, q, k, v):
  """Attention over clipped `start` and `stop`; keeps the output and its lse."""
  return _forward(options, start, stop, degree, q, k, v)[0]


def _forward(options, *operands):
  out, lse = _run("forward", options, *operands)
  # Named so that a remat policy can keep them and never repeat the forward.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return out, (*operands, out, lse)


def _backward(options, residuals, g):
  return None, None, None, *_run("backward", options, *residuals, g)


attention.defvjp(_forward, _backward)
