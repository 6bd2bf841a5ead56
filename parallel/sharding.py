"""Fully sharded data parallelism over one flat axis of devices.

Parameters, gradients and optimizer state are cut along one dimension each and
gathered where a block uses them; activations are cut by row. One device is
the same program with N = 1.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "device"

# Below this many elements a device, a slice costs more to gather than to keep.
SMALLEST_SHARD = 128


def flat_mesh(devices: Any = None) -> Mesh:
  """Returns the mesh of all devices, or of those given, on one axis.

  Devices follow the axes of a TPU's torus. In another order XLA writes every
  all-gather as an all-reduce of zero-padded parts, of twice the bytes.
  """
  devices = jax.devices() if devices is None else devices
  devices = mesh_utils.create_device_mesh((len(devices),), devices)
  return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def fsdp_spec(shape: tuple[int, ...], devices: int) -> P:
  """Chooses the dimension along which an array is cut, from its shape alone.

  It is the largest one that the device count divides. The leading axis of
  arrays of three and more dimensions stands for layers, which `lax.scan`
  takes one at a time, so it is never cut; neither are small arrays.
  """
  if np.prod(shape, dtype=np.int64) < SMALLEST_SHARD * devices:
    return P()
  first = 1 if len(shape) > 2 else 0
  candidates = [
    axis for axis in range(first, len(shape)) if shape[axis] % devices == 0
  ]
  if not candidates:
    return P()
  axis = max(candidates, key=lambda axis: (shape[axis], axis))
  return P(*(AXIS if i == axis else None for i in range(axis + 1)))


def fsdp(tree: Any, mesh: Mesh) -> Any:
  """Returns the sharding of every leaf of a tree of arrays or shapes."""
  return jax.tree.map(
    lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.size)), tree
  )


def by_row(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of a batch or of activations, cut along `axis`."""
  return NamedSharding(mesh, P(*(None,) * axis, AXIS))


def place(tree: Any, shardings: Any) -> Any:
  """Puts host arrays, the same in every process, on the mesh."""

  def put(array, sharding):
    if sharding.is_fully_addressable:
      return jax.device_put(array, sharding)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(put, tree, shardings)


def shard_model(model: Any, mesh: Mesh) -> None:
  """Makes a `Decoder` gather its weights and keep its rows where they are.

  The gather stands inside a block's rematerialised body: gathered weights are
  then no residuals of the scan. Their gradients are told to be cut like the
  weights, so that they are reduce-scattered, not all-reduced and then cut. The
  embedding's would be cut by gathering those of all tokens, so it is not told.
  """
  if mesh.size == 1:
    return
  whole, rows = NamedSharding(mesh, P()), by_row(mesh)
  constrain = jax.lax.with_sharding_constraint
  layers = model.layers.stack_size

  def gather(leaf):
    spec = fsdp_spec((layers, *leaf.shape), mesh.size)
    cut = NamedSharding(mesh, P(*spec[1:]))
    collect = jax.custom_vjp(lambda x: constrain(x, whole))
    collect.defvjp(
      lambda x: (constrain(x, whole), None), lambda _, g: (constrain(g, cut),)
    )
    return collect(leaf)

  model.gather = functools.partial(jax.tree.map, gather)
  model.gather_ends = lambda state: constrain(state, whole)
  model.constrain = lambda x: constrain(x, rows)
