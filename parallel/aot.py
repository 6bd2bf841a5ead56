"""Compiles a program for accelerators that are not there, and reports on it.

TPUs through libtpu, NVIDIA GPUs through JAX's CUDA plugin and a description of
the device; neither needs the hardware or a driver.

What is exact: memory, which is the compiler's own buffer assignment (GPUs lack
what their libraries allocate at run time); which collectives run how often on
how many bytes, as long as loop bounds are constants, as those of `lax.scan`
are; FLOPs of matrix products outside kernels and loops whose bounds are data.
What is an estimate: every time. XLA's own figures are no help there: its cost
analysis counts loop bodies once and its optimal_seconds can be negative.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from adaptax.pallas_kernels.errors import unknown_name
from adaptax.pallas_kernels.quiet import quiet
from adaptax.parallel import hlo
from adaptax.parallel.flops import product_flops
from adaptax.parallel.hardware import CHIPS, GIB, Chip

# Without these libtpu asks a metadata server which machine it is on.
_TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CUDA_PLUGINS = "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"
_GPU_LIMITS = """
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: 2048 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536
  registers_per_block_limit: 65536"""


class Target(NamedTuple):
  """Hardware to compile for.

  Attributes:
    name: as `target` takes it.
    chip: facts about one device.
    shape: of a TPU slice in chips; (devices,) for GPUs.
    devices: to build a mesh of; they can only be compiled for.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: list[jax.Device]

  @property
  def platform(self) -> str:
    """As `lax.platform_dependent` names it."""
    return "tpu" if self.chip.dimensions else "cuda"


@dataclasses.dataclass(frozen=True)
class Report:
  """One compiled step, by device.

  Attributes:
    target: what it is compiled for.
    arguments: bytes of the arguments.
    temporaries: bytes of everything that lives only during the step.
    peak: bytes needed: arguments, results that do not reuse them, temporaries
      and the program itself.
    fits: whether that much memory is there, for the compiler too.
    module: the compiled program, to look into.
    flops: of matrix products in a step.
    largest: (bytes, what) of the largest buffers when memory is fullest.
    seconds: that compiling took.
  """

  target: Target
  arguments: int
  temporaries: int
  peak: int
  fits: bool
  module: hlo.Module
  flops: float
  largest: list[tuple[int, str]]
  seconds: float

  @functools.cached_property
  def collectives(self) -> dict[str, hlo.Total]:
    """Executions in a step and bytes by kind; see `hlo.Module`."""
    return self.module.collectives()

  @functools.cached_property
  def roofline(self) -> dict[str, float]:
    """Estimated seconds at peak rates of what a step cannot do without."""
    chip, shape = self.target.chip, self.target.shape
    return {
      "compute": self.flops / chip.flops,
      "memory": self.module.traffic() / chip.bandwidth,
      "links": sum(
        chip.seconds(kind, total.bytes, shape)
        for kind, total in self.collectives.items()
      ),
    }

  def __str__(self) -> str:
    chip, count = self.target.chip, len(self.target.devices)
    times = self.roofline
    slowest = max(times, key=lambda name: times[name])
    verdict = "fits" if self.fits else "DOES NOT FIT"
    rows = {
      "target": f"{self.target.name}, {count} x {chip.kind}; figures are for"
      f" one of them, compiled in {self.seconds:.0f} s",
      "arguments": _gib(self.arguments),
      "temporaries": _gib(self.temporaries),
      "peak": f"{_gib(self.peak)} of {_gib(chip.hbm).strip()},"
      f" {self.peak / chip.hbm:.1%}: {verdict}",
    }
    for kind, total in sorted(self.collectives.items()):
      size = total.bytes / 1e9
      rows[kind] = f"{size:8.3f} GB in {total.executions:,} a step"
    rows["FLOPs"] = f"{self.flops:.4g} a step"
    rows["roofline"] = (
      f"{times[slowest]:.4g} s a step, an ESTIMATE at peak rates; "
      + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in times.items())
    )
    lines = [f"{label:<20}{text}" for label, text in rows.items()]
    if not self.fits:
      lines.append("largest buffers when memory is fullest:")
      lines += [f"{_gib(size)}  {what}" for size, what in self.largest]
    return "\n".join(lines)


def target(name: str) -> Target:
  """Returns absent hardware by name: `v5p:4x4x4`, `h100:8`.

  Raises:
    ValueError: there is no such chip, or no such slice of it.
    ModuleNotFoundError: the compiler for it is not installed; the message is
      the command that installs it.
  """
  generation, _, size = name.partition(":")
  if generation not in CHIPS:
    raise unknown_name("chip", generation, CHIPS)
  chip = CHIPS[generation]
  if size not in chip.sizes:
    names = [f"{generation}:{size}" for size in chip.sizes]
    raise unknown_name("topology", name, names)
  shape = tuple(map(int, size.split("x")))
  load = _tpu if chip.dimensions else _gpu
  with quiet():
    jax.devices("cpu")  # Plugins complain when the first backend is made.
    return Target(name, chip, shape, load(chip, generation, shape))


def compile_for(
  where: Target, function: Any, *args: Any, open_flops: float = 0.0
) -> Report:
  """Compiles a jitted function and reports what it needs.

  Args:
    where: its devices are those of the arguments' shardings.
    function: from `jax.jit`.
    *args: trees of `jax.ShapeDtypeStruct` with shardings.
    open_flops: FLOPs of all devices in kernels and loops whose bounds are
      data, which cannot be seen; added if there are any of these.
  """
  began = time.perf_counter()
  traced = function.trace(*args)
  flops, unseen = product_flops(traced.jaxpr, where.platform)
  if unseen:
    flops += open_flops
  with tempfile.TemporaryDirectory() as folder:
    memory = _compile(traced.lower(), folder)
    text = lambda ending: _read(folder, f"*after_optimizations{ending}.txt")
    module, live = hlo.Module(text("")), text("-live-range")
    total = text("-memory-usage-report")
  if memory:
    arguments = memory.argument_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    peak = arguments + temporaries + memory.generated_code_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
  else:
    arguments = sum(map(_local_bytes, jax.tree.leaves(args)))
    peak = int(re.findall(r"Total bytes: (\d+)", total)[0])
    temporaries = peak - arguments
  return Report(
    where,
    arguments,
    temporaries,
    peak,
    memory is not None and peak <= where.chip.hbm,
    module,
    flops / len(where.devices),
    _largest(live, module),
    time.perf_counter() - began,
  )


def _tpu(chip, generation, shape) -> list[jax.Device]:
  _require("pip install libtpu", "libtpu")
  for key, value in _TPU_ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  options: dict[str, Any] = {"wrap": (*chip.wraps(shape), False)[:3]}
  if generation == "v4":
    # One JAX device a chip, as on real ones.
    options["chip_config_name"] = "megacore"
  name = f"{generation}:{'x'.join(map(str, shape))}"
  return topologies.get_topology_desc(name, "tpu", **options).devices


def _gpu(chip, generation, shape) -> list[jax.Device]:
  version = jax.__version__
  command = f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
  _require(f"pip install --no-deps {command}", *_CUDA_PLUGINS)
  per_host = min(shape[0], 8)
  facts = dict(chip.description)
  capability = f"cuda_compute_capability {{ major: {facts.pop('major')} }}"
  facts |= {
    "memory_bandwidth": int(chip.bandwidth),
    "device_memory_size": chip.hbm,
  }
  fields = " ".join(f"{key}: {value}" for key, value in facts.items())
  return topologies.get_topology_desc(
    "",
    "cuda",
    topology=f"1x{shape[0] // per_host}x{per_host}",
    target_config=f"gpu_device_info {{ {_GPU_LIMITS} {fields} {capability} }}"
    ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }'
    f' device_description_str: "{chip.kind}"',
  ).devices


def _require(command: str, *modules: str) -> None:
  """Raises unless one of the modules is installed."""
  for module in modules:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) and importlib.util.find_spec(module):
      return
  raise ModuleNotFoundError(f"{modules[0]} is not installed: {command}")


def _compile(lowered, folder) -> Any:
  """Writes XLA's dumps; returns its memory analysis, None where too large.

  The dumps stand for `as_text`, which cannot print every TPU program.
  """
  options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
  try:
    with quiet():
      return lowered.compile(compiler_options=options).memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    if "CompileTimeHbmOom" not in str(error):
      raise
    return None


def _read(folder, pattern) -> str:
  (path,) = pathlib.Path(folder).glob(pattern)
  return path.read_text()


def _local_bytes(leaf) -> int:
  shape = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * leaf.dtype.itemsize


def _largest(live: str, module: hlo.Module) -> list[tuple[int, str]]:
  """The largest buffers of XLA's list of those alive at the peak."""
  _, _, live = live.partition("(peak):")
  found = []
  for name, size in re.findall(
    r"^ +(\S+?)(?:\{\d*\})?: (\d+) bytes", live, re.M
  ):
    if (made := module.find(name)) and made.arrays:
      array = max(made.arrays, key=lambda array: array.bytes)
      name = f"{array.dtype}{list(array.dims)} {made.op_name}"
    found.append((int(size), name))
  return sorted(found, reverse=True)[:8]


def _gib(size: float) -> str:
  return f"{size / GIB:8.2f} GiB"
