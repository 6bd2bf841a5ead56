"""Identical blocks whose leaves carry a leading layer axis, applied by scan.

Compile time and code size do not grow with depth, and an adapter or an
optimizer sees one (layers, in, out) array for each kind of weight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

SAVED_NAMES = ("attention_out", "attention_lse")

# A save-only policy keeps what it names; everything else is recomputed.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
  "full": None,
  "attention": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(
  make: Callable[[nnx.Rngs], nnx.Module], size: int, *, rngs: nnx.Rngs
) -> Any:
  """Makes `size` modules as one, every leaf with a leading axis of `size`.

  The attribute `stack_size` tells `adapt` and friends that the leaves below
  are stacked.
  """
  create = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=0, out_axes=0))
  module: Any = create(rngs)
  module.stack_size = size
  return module


def apply_stack(
  module: Any,
  step: Callable[[Any, Any, Any], tuple[Any, Any]],
  carry: Any,
  xs: Any = None,
  *,
  remat: str = "none",
  unroll: bool = False,
  gather: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
  """Runs `carry, y = step(block, carry, x)` over the blocks in order.

  Args:
    module: a module from `stack`.
    step: called with one block, whose leaves have no layer axis.
    carry: what flows from block to block.
    xs: a pytree with a leading layer axis, or None.
    remat: `none`, or a key of `REMAT_POLICIES`: what backward recomputes.
    unroll: a Python loop instead of `lax.scan`, for debugging.
    gather: applied to a block's state inside the rematerialised body, so that
      weights gathered from other devices are never kept for backward.

  Returns:
    The last carry and the stacked `y`.
  """
  graphdef, state = nnx.split(module)

  def body(carry, inputs):
    block_state, x = inputs
    if gather is not None:
      block_state = gather(block_state)
    return step(nnx.merge(graphdef, block_state), carry, x)

  if remat != "none":
    body = jax.checkpoint(
      body, policy=REMAT_POLICIES[remat], prevent_cse=unroll
    )
  if not unroll:
    return jax.lax.scan(body, carry, (state, xs))
  ys = []
  for index in range(module.stack_size):
    inputs = jax.tree.map(lambda leaf: leaf[index], (state, xs))  # noqa: B023
    carry, y = body(carry, inputs)
    ys.append(y)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)
