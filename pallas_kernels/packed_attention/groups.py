"""Runs attention over whole sequences on a group's exchanged heads."""

import functools

import jax
import jax.numpy as jnp


def _merge(x, degree):
  """(H, T, ...) of a group -> (H // degree, degree * T, ...) whole sequences."""
  heads, tokens, *rest = x.shape
  x = x.reshape(degree, heads // degree, tokens, *rest).swapaxes(0, 1)
  return x.reshape(heads // degree, degree * tokens, *rest)


def _split(x, degree):
  """The inverse of `_merge`."""
  heads, tokens, *rest = x.shape
  x = x.reshape(heads, degree, tokens // degree, *rest).swapaxes(0, 1)
  return x.reshape(heads * degree, tokens // degree, *rest)


def degrees(devices, kv_heads):
  """The degrees that a group can have: powers of two that divide the heads."""
  candidates = (1 << i for i in range(devices.bit_length()))
  return [d for d in candidates if kv_heads % d == 0]


def by_degree(function, start, degree, *arrays):
  """Calls function(start, *arrays) on whole sequences.

  Static shapes need one branch a possible degree; `degree` stays data.
  """
  tokens, kv_heads = arrays[0].shape[1], arrays[1].shape[0]
  choices = degrees(start.shape[0] // tokens, kv_heads)

  def branch(size, *arrays):
    merged = [_merge(x, size) for x in arrays]
    results = function(start[: size * tokens], *merged)
    return tuple(_split(x, size) for x in results)

  branches = [functools.partial(branch, size) for size in choices]
  index = (degree > jnp.asarray(choices)).sum()
  return jax.lax.switch(index, branches, *arrays)


def by_row(function, tokens, start, *arrays):
  """Calls function(start, *arrays) on each stretch of `tokens` tokens."""
  start = start.reshape(-1, tokens)
  start -= jnp.arange(start.shape[0], dtype=jnp.int32)[:, None] * tokens
  cut = [x.reshape(x.shape[0], -1, tokens, *x.shape[2:]) for x in arrays]
  axes = (0, *[1] * len(cut))
  results = jax.vmap(function, axes, 1)(start, *cut)
  return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in results)
