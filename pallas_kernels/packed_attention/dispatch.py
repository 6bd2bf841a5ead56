"""Picks a backend for the target platform, and differentiates through it."""

import difflib
import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from adaptax.pallas_kernels.packed_attention import groups, reference, tpu, xla

BACKENDS = ("auto", "reference", "xla", "tpu")
# The longest row for which one dense product beats a loop over blocks, and
# the loop's block length.
DENSE_TOKENS = {"cpu": 128, "gpu": 1024}
XLA_BLOCK = {"cpu": 64, "gpu": 512}


class Options(NamedTuple):
  """What is static of an attention call; no document is longer than `row`."""

  scale: float
  softcap: float | None
  backend: str
  block_q: int | None
  block_kv: int | None
  row: int


def _tpu_blocks(options, q, k):
  heads, tokens, dim = q.shape
  block_q, block_kv = tpu.default_blocks(heads, k.shape[0], tokens, dim)
  return options.block_q or block_q, options.block_kv or block_kv


def _tpu_problem(options, q, k):
  return tpu.problem(*q.shape[1:], *_tpu_blocks(options, q, k))


def check(options, q, k):
  """Raises ValueError if the backend is unknown or cannot take the sizes."""
  if options.backend not in BACKENDS:
    near = difflib.get_close_matches(options.backend, BACKENDS, 1, 0)[0]
    raise ValueError(
      f"unknown backend {options.backend!r}, did you mean {near!r}?"
      f" One of {BACKENDS}"
    )
  problem = _tpu_problem(options, q, k)
  if options.backend == "tpu" and problem:
    raise ValueError(f"backend 'tpu': {problem}")


def _choose(options, platform, q, k):
  """The backend that "auto" means on a platform."""
  if options.backend != "auto":
    return options.backend
  if platform == "tpu" and not _tpu_problem(options, q, k):
    return "tpu"
  dense = options.row <= DENSE_TOKENS.get(platform, 0)
  return "reference" if dense else "xla"


def _on_tpu(name, options, interpret, start, stop, degree, q, k, *arrays):
  block_q, block_kv = _tpu_blocks(options, q, k)
  return getattr(tpu, name)(
    start,
    stop,
    degree,
    q,
    k,
    *arrays,
    scale=options.scale,
    softcap=options.softcap,
    block_q=block_q,
    block_kv=block_kv,
    interpret=interpret,
  )


def _on_platform(name, options, platform, start, stop, degree, q, k, *arrays):
  """Runs the pass `name`, "forward" or "backward", where `platform` is best."""
  backend = _choose(options, platform, q, k)
  arrays = (q, k, *arrays)
  if backend == "tpu":
    interpret = platform != "tpu"
    return _on_tpu(name, options, interpret, start, stop, degree, *arrays)
  settings = {"scale": options.scale, "softcap": options.softcap}
  if backend == "xla":
    block = XLA_BLOCK.get(platform, XLA_BLOCK["gpu"])
    settings["block_q"] = options.block_q or block
    settings["block_kv"] = options.block_kv or block
    run = functools.partial(getattr(xla, name), **settings)
  else:
    run = functools.partial(getattr(reference, name), **settings)
    if options.row <= q.shape[1]:
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
