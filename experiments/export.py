"""Writes what a run trained as folders for Hugging Face PEFT and transformers.

  python -m adaptax.experiments.export --workdir=runs/smollm2 \
      --format=both --output=runs/smollm2/export

`peft` is the adapter alone, `hf` the whole model with the adapter merged, as
config.json and safetensors beside the tokenizer of the base model. `both`
writes them to OUTPUT/adapter and OUTPUT/merged. The run is only read; it may
still go on.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
from absl import app, flags
from flax import nnx

from adaptax.experiments import config as configs
from adaptax.experiments.checkpoints import Checkpoints
from adaptax.experiments.fingerprint import fingerprint
from adaptax.experiments.run import Run
from adaptax.experiments.weights import gguf
from adaptax.experiments.weights.hf_folder import check_target
from adaptax.experiments.weights.peft import save_adapter
from adaptax.experiments.weights.pretrained import HUB, save_pretrained
from adaptax.layers.adapters import merge
from adaptax.parallel import flat_mesh

WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run; its newest checkpoint."
)
CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "One checkpoint of a run, WORKDIR/checkpoints/STEP."
)
FORMAT = flags.DEFINE_enum(
  "format", "peft", ("peft", "hf", "both"), "See above."
)
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.")

# What lies beside the weights of a base and serves the merged model too.
_BESIDE = (
  "tokenizer*.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
)


def main(argv: list[str]) -> None:
  del argv
  try:
    export(WORKDIR.value, CHECKPOINT.value, FORMAT.value, OUTPUT.value)
  except (ValueError, OSError) as error:
    sys.exit(f"export: {error}")


def export(
  workdir: str | None, checkpoint: str | None, kind: str, output: str | None
) -> None:
  """Exports the newest good checkpoint of a run, or the one named."""
  if (workdir is None) == (checkpoint is None) or output is None:
    raise ValueError("give --output, and one of --workdir and --checkpoint")
  if checkpoint is None:
    root, steps = pathlib.Path(str(workdir)), None
  else:
    steps = [pathlib.Path(checkpoint).absolute()]
    root = steps[0].parent.parent
  adapter, merged = pathlib.Path(output), pathlib.Path(output)
  if kind == "both":
    adapter, merged = adapter / "adapter", merged / "merged"
  check_target(adapter)
  check_target(merged)
  run, model = read(root, steps)
  source = run.source.path
  if kind != "hf":
    base = HUB.get(run.config.model.name) or source
    save_adapter(adapter, model, base and str(base))
    print(f"adapter    {adapter}")
  if kind != "peft":
    save_pretrained(merged, merge(model), **companions(source))
    print(f"merged     {merged}")


def read(
  root: pathlib.Path, steps: list[pathlib.Path] | None = None
) -> tuple[Run, nnx.Module]:
  """Returns a run and its model, as saved in the newest of some checkpoints.

  Args:
    root: the work dir of the run.
    steps: folders of checkpoints; None means all.

  Raises:
    FileNotFoundError: no run or no checkpoint there.
    ValueError: the base model is no longer the one that the run adapted.
  """
  if not (root / "config.json").exists():
    raise FileNotFoundError(f"{root} is no run: it has no config.json")
  config = configs.from_json((root / "config.json").read_text("utf-8"))
  if steps is None:
    steps = sorted((root / "checkpoints").glob("[0-9]*"))
  devices = jax.devices()
  if config.plan.rows % len(devices):
    devices = devices[:1]
  run = Run(config, flat_mesh(devices))
  frozen = run.model.materialise()[1]
  state, meta = _restore(run, steps)
  if meta["frozen"] != fingerprint(frozen):
    raise ValueError(
      f"the weights of model {config.model.name!r} are not those that the run"
      f" in {root} adapted"
    )
  return run, run.module(state["trainable"], frozen)


def _restore(run: Run, steps: list[pathlib.Path]) -> tuple[Any, dict]:
  # Links, because opening the run's own folder tidies it, which only the run
  # itself may do.
  with tempfile.TemporaryDirectory() as view:
    for step in steps:
      if step.name.isdigit() and step.is_dir():
        (pathlib.Path(view) / step.name).symlink_to(step.absolute())
    with Checkpoints(view, every=1, keep=len(steps) + 1) as checkpoints:
      found = checkpoints.restore(run.state)
  if found is None:
    where = steps[0] if len(steps) == 1 else "the work dir"
    raise FileNotFoundError(f"no good checkpoint in {where}")
  newest, state, meta = found
  print(f"checkpoint step {newest}")
  return state, meta


def companions(source: pathlib.Path | None) -> dict[str, Any]:
  """What `save_pretrained` takes over from the base: ids, tokenizer files."""
  if source is None:
    return {}
  if source.is_dir():
    raw = json.loads((source / "config.json").read_text("utf-8"))
    files = [path for name in _BESIDE for path in source.glob(name)]
    return {"extra": _special_ids(raw, ""), "files": files}
  metadata = gguf.read_gguf(source).metadata
  return {"extra": _special_ids(metadata, "tokenizer.ggml.")}


def _special_ids(values: dict[str, Any], prefix: str) -> dict[str, Any]:
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  return {
    name: values[prefix + name] for name in names if prefix + name in values
  }


if __name__ == "__main__":
  app.run(main)
