"""Completes prompts with a model and, where there is one, its adapter.

  python -m adaptax.experiments.generate --workdir=runs/finetune_smollm2 \
      --prompt="def main(" --max_tokens=64 --temperature=0.8
  python -m adaptax.experiments.generate --model=smollm2 [--adapter=FOLDER] \
      --prompts_file=prompts.txt --temperature=0

A work dir gives the base model of a run with the weights or the adapter of its
newest checkpoint. A model is a name, a Hugging Face folder or a GGUF file, an
adapter a PEFT folder. Temperature 0 decodes greedily.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import app, flags, logging
from flax import nnx

from adaptax.experiments.data import Tokenizer, load_tokenizer
from adaptax.experiments.decoding import Sampling, generate
from adaptax.experiments.restore import read
from adaptax.experiments.weights.peft import load_adapter
from adaptax.experiments.weights.pretrained import (
  fill,
  load_pretrained,
  resolve,
)
from adaptax.layers import Decoder

# Other binaries have it too, and tests import several of them.
WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run; its newest checkpoint.", allow_override=True
)
MODEL = flags.DEFINE_string("model", None, "smollm2, a folder or a GGUF file.")
ADAPTER = flags.DEFINE_string("adapter", None, "A PEFT folder for --model.")
PROMPT = flags.DEFINE_string("prompt", None, "The text to go on with.")
PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "A text file of prompts, one a line, run as one batch."
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Tokens to add, at most.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 decodes greedily.")
TOP_K = flags.DEFINE_integer("top_k", 50, "Likeliest tokens kept; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Probability of the tokens kept.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random choices.")


def main(argv: list[str]) -> None:
  # absl sets INFO where the user asked for nothing.
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if argv[1:]:
      raise ValueError(f"unexpected argument {argv[1]!r}; quote the prompt")
    sampling = Sampling(
      MAX_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value
    )
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value)
    model, tokenizer = open_model(WORKDIR.value, MODEL.value, ADAPTER.value)
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    tokens, seconds = generate(
      model,
      ids,
      sampling,
      key=jax.random.key(SEED.value),
      eos_id=tokenizer.eos_id,
    )
  except (ValueError, OSError) as error:
    sys.exit(f"generate: {error}")
  for prompt, before, after in zip(prompts, ids, tokens):
    # Decoded together, because some vocabularies strip a text's first space.
    text = tokenizer.decode([*before, *after])
    print(f"{prompt}{text[len(tokenizer.decode(before)) :]}\n")
  count = sum(map(len, tokens))
  print(f"{count} tokens, {count / seconds:.1f} tokens/s")


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
  """Returns the prompt, or those of a file."""
  if (prompt is None) == (path is None):
    raise ValueError("give one of --prompt and --prompts_file")
  if path is None:
    prompts = [str(prompt)]
  else:
    prompts = pathlib.Path(path).read_text("utf-8").splitlines()
  if "" in prompts:
    raise ValueError(f"prompt {prompts.index('') + 1} is empty")
  return prompts


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """Frames a prompt as the training data frames the start of a document."""
  ids = tokenizer.encode(prompt).tolist()
  if ids and tokenizer.bos_id is not None:
    ids.insert(0, tokenizer.bos_id)
  return ids


def open_model(
  workdir: str | None, name: str | None, adapter: str | None
) -> tuple[Any, Tokenizer]:
  """Returns the decoder of a run, or of a base and a PEFT folder."""
  if (workdir is None) == (name is None):
    raise ValueError("give one of --workdir and --model")
  if workdir is not None:
    if adapter is not None:
      raise ValueError("--adapter goes with --model, a run has its own")
    run, model = read(pathlib.Path(workdir), devices=jax.devices()[:1])
    return model, load_tokenizer(run.config.data.tokenizer, run.source.path)
  tokenizer = load_tokenizer("model", resolve(str(name)))
  config, weights = load_pretrained(str(name))
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  fill(model, weights)
  if adapter is not None:
    model = load_adapter(adapter, model, rngs=nnx.Rngs(0))
  model.eval()
  return model, tokenizer


if __name__ == "__main__":
  app.run(main)
