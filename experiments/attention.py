"""Which attention function a model is given, by how its batch is laid out."""

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adaptax.experiments.step import Attention
from adaptax.pallas_kernels.packed_attention import packed_attention
from adaptax.parallel import AXIS


def packed(mesh: Mesh) -> Attention:
  """Every row of packed documents is attended on the device that holds it."""

  def attention(batch):
    def attend(q, k, v, **options):
      local = functools.partial(packed_attention, **options)
      if mesh.size == 1:
        return local(q, k, v, batch["start"])
      return jax.shard_map(
        local, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
      )(q, k, v, batch["start"])

    return attend

  return attention


PLANS = {"pack": packed}
