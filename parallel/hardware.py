"""Facts about accelerators, for feasibility checks and labelled estimates.

Sources: jax/_src/pallas/mosaic/tpu_info.py and Google Cloud's TPU pages for
TPU compute and bandwidth; the scaling book (jax-ml/scaling-book) for TPU link
rates; the limits that libtpu 0.0.52 compiles against for usable TPU memory;
NVIDIA's data sheets for GPU compute and links; OpenXLA's descriptions under
xla/backends/gpu/target_config/specs for the other numbers of GPUs.
"""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX shows it: a chip, or half of a TPU7x.

  Attributes:
    kind: `jax.Device.device_kind`.
    flops: dense bfloat16 FLOP/s at peak.
    hbm: bytes of memory that a program can have.
    bandwidth: of that memory, bytes/s.
    link: bytes/s one way, of a torus link or of all of a GPU's NVLinks.
    dimensions: of the TPU torus; 0 for GPUs, which are switched.
    network: bytes/s one way from a GPU to other hosts.
    sizes: how many there can be: TPU slices by shape, GPUs by number.
    description: what XLA's GPU backend asks about a GPU; see `aot`.
  """

  kind: str
  flops: float
  hbm: int
  bandwidth: float
  link: float
  dimensions: int = 0
  network: float = 0.0
  sizes: tuple[str, ...] = ()
  description: dict[str, int | float] = dataclasses.field(default_factory=dict)

  def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether each axis of a slice closes to a ring.

    In three dimensions all do in multiples of the 4x4x4 cube, in two those
    that span the 16 chips of a pod.
    """
    if self.dimensions == 3:
      return (all(size % 4 == 0 for size in shape),) * 3
    return tuple(size == 16 for size in shape)

  def seconds(self, kind: str, size: float, shape: tuple[int, ...]) -> float:
    """Estimates the time of a collective over all devices at peak link rate.

    Args:
      kind: the HLO opcode.
      size: bytes of the whole array on one device: what an all-gather makes,
        what a reduce-scatter or an all-to-all takes.
      shape: of the TPU slice, or (devices,).
    """
    devices = math.prod(shape)
    if devices == 1:
      return 0.0
    rounds = 2 if kind == "all-reduce" else 1
    if not self.dimensions:
      rate = self.link if devices <= 8 else self.network
      return rounds * size * (devices - 1) / devices / rate
    ways = [1 + wrap for wrap in self.wraps(shape)]
    if kind == "collective-permute":
      return size / self.link
    if kind.endswith("all-to-all"):
      # Half of what each half of an axis holds crosses its middle.
      crossing = (n * size / 4 / way for n, way in zip(shape, ways))
      return max(crossing) / self.link
    rate = sum(way * self.link for n, way in zip(shape, ways) if n > 1)
    return rounds * size * (devices - 1) / devices / rate


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
  "8x8x16",
  "8x16x16",
)
_GPUS = tuple(str(2**power) for power in range(10))

_AMPERE = {
  "major": 8,
  "core_count": 108,
  "fpus_per_core": 64,
  "clock_rate_ghz": 1.41,
  "l2_cache_size": 41943040,
  "shared_memory_per_core": 167936,
  "shared_memory_per_block_optin": 166912,
}
_HOPPER = {
  "major": 9,
  "core_count": 132,
  "fpus_per_core": 128,
  "clock_rate_ghz": 1.98,
  "l2_cache_size": 52428800,
  "shared_memory_per_core": 233472,
  "shared_memory_per_block_optin": 232448,
}
_BLACKWELL = _HOPPER | {
  "major": 10,
  "core_count": 148,
  "clock_rate_ghz": 1.965,
  "l2_cache_size": 132644864,
}

# Where sources differ: bandwidth of v5p is 2.46 to 2.8e12, peak of v6e 918 or
# 920e12. The two devices of a TPU7x share its links.
CHIPS: dict[str, Chip] = {
  "v4": Chip(
    "TPU v4",
    flops=275e12,
    hbm=int(30.75 * GIB),
    bandwidth=1.23e12,
    link=4.5e10,
    dimensions=3,
    sizes=_CUBES,
  ),
  "v5e": Chip(
    "TPU v5 lite",
    flops=197e12,
    hbm=int(15.75 * GIB),
    bandwidth=8.19e11,
    link=4.5e10,
    dimensions=2,
    sizes=_SQUARES,
  ),
  "v5p": Chip(
    "TPU v5",
    flops=459e12,
    hbm=int(95.73 * GIB),
    bandwidth=2.765e12,
    link=9e10,
    dimensions=3,
    sizes=_CUBES,
  ),
  "v6e": Chip(
    "TPU v6 lite",
    flops=918e12,
    hbm=int(31.24 * GIB),
    bandwidth=1.64e12,
    link=9e10,
    dimensions=2,
    sizes=_SQUARES,
  ),
  "tpu7x": Chip(
    "TPU7x",
    flops=1153.5e12,
    hbm=int(94.74 * GIB),
    bandwidth=3.69e12,
    link=5e10,
    dimensions=3,
    sizes=_CUBES,
  ),
  "a100": Chip(
    "NVIDIA A100-SXM4-80GB",
    flops=312e12,
    hbm=85100068864,
    bandwidth=2.039e12,
    link=3e11,
    network=2.5e10,
    sizes=_GPUS,
    description=_AMPERE,
  ),
  "h100": Chip(
    "NVIDIA H100 80GB HBM3",
    flops=989e12,
    hbm=84942979072,
    bandwidth=3.352e12,
    link=4.5e11,
    network=5e10,
    sizes=_GPUS,
    description=_HOPPER,
  ),
  "h200": Chip(
    "NVIDIA H200 141GB HBM3e",
    flops=989e12,
    hbm=151397597184,
    bandwidth=4.8e12,
    link=4.5e11,
    network=5e10,
    sizes=_GPUS,
    description=_HOPPER,
  ),
  "b200": Chip(
    "NVIDIA B200",
    flops=2250e12,
    hbm=191514411008,
    bandwidth=7.672e12,
    link=9e11,
    network=5e10,
    sizes=_GPUS,
    description=_BLACKWELL,
  ),
}
