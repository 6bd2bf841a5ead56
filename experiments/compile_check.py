"""Compiles a config's train step for absent hardware; says whether it fits.

  python -m adaptax.experiments.compile_check \
      --config=experiments/configs/llama_7b_lora.py --topology=v5p:4x4x4

Prints, for one device, the memory that the step needs, its collectives and
FLOPs, and a roofline time, which is an estimate; see `parallel.aot`. Where the
step does not fit, the largest buffers follow. The exit status is 0 only if it
fits. Topologies are TPU slices by shape (v4, v5e, v5p, v6e, tpu7x) and NVIDIA
GPUs by number (a100:8, h100:8, h200:8, b200:8).
"""

import sys
from typing import Any

from adaptax.pallas_kernels.quiet import quiet

# Importing jax loads the CUDA plugin, which complains that there is no driver.
with quiet():
  import jax
  from absl import app, flags

  from adaptax.experiments import config as configs
  from adaptax.experiments.registry import REGISTRIES
  from adaptax.experiments.run import Run
  from adaptax.parallel import aot, flat_mesh

TOPOLOGY = flags.DEFINE_string("topology", None, "What to compile for.")

# Matrix products a pair of query and key: those of the forward pass, and those
# of the backward pass, whose TPU kernels compute two of them twice.
_FORWARD, _BACKWARD = 2, {"tpu": 7, "cuda": 5}


def main(config: Any) -> None:
  jax.config.update("jax_platforms", "cpu")
  # A cached executable would leave no dumps to read.
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    report = check(config, TOPOLOGY.value)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f"compile_check: {error}")
  except jax.errors.JaxRuntimeError as error:
    sys.exit(f"compile_check: {str(error).splitlines()[0]}")
  sys.exit(0 if report.fits else 1)


def check(config: Any, topology: str | None) -> aot.Report:
  """Compiles the train step of a config and prints the report.

  Raises:
    ValueError, OSError: the user has to change something.
    ModuleNotFoundError: the compiler for the topology is not installed.
  """
  if not topology:
    raise ValueError("--topology is missing: name one, such as v5p:4x4x4")
  target = aot.target(topology)
  run = Run(config, flat_mesh(target.devices))
  report = aot.compile_for(
    target,
    run.train_step(),
    run.state,
    run.model.split.frozen,
    run.abstract_batch(),
    open_flops=attention_flops(run, target.platform),
  )
  print(report)
  print(
    f"FLOPs and times are those of documents of {run.plan.longest:,} tokens,"
    " the longest that the plan can place"
  )
  return report


def attention_flops(run: Run, platform: str) -> float:
  """FLOPs of attention in a step of the longest documents there can be."""
  c, plan = run.source.config, run.plan
  window = min(c.sliding_window or plan.longest, plan.longest)
  pairs = window * (plan.longest - (window - 1) / 2)
  documents = run.micro_batches * plan.rows * plan.tokens / plan.longest
  again = c.remat in ("full", "dots")
  products = _FORWARD * (1 + again) + _BACKWARD[platform]
  per_pair = 2 * c.head_dim * c.num_heads * products
  return float(documents * pairs * per_pair * c.num_layers)


if __name__ == "__main__":
  app.run(main, flags_parser=configs.flags_parser(REGISTRIES))
