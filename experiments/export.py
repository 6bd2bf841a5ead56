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
from typing import Any

from absl import app, flags

from adaptax.experiments.restore import read
from adaptax.experiments.weights import gguf
from adaptax.experiments.weights.hf_folder import check_target
from adaptax.experiments.weights.peft import save_adapter
from adaptax.experiments.weights.pretrained import HUB, save_pretrained
from adaptax.layers.adapters import merge

# Other binaries have it too, and tests import several of them.
WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run; its newest checkpoint.", allow_override=True
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
