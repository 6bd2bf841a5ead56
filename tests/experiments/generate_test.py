"""The generate binary on models, adapters, runs and bad command lines."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from absl import flags
from absl.testing import flagsaver
from flax import nnx

from adaptax.experiments import config as configs
from adaptax.experiments import generate as binary
from adaptax.experiments.checkpoints import Checkpoints
from adaptax.experiments.decoding import Sampling, generate
from adaptax.experiments.fingerprint import fingerprint
from adaptax.experiments.registry import REGISTRIES
from adaptax.experiments.run import Run
from adaptax.experiments.weights import gguf
from adaptax.experiments.weights.peft import load_adapter
from adaptax.parallel import flat_mesh

GOLDEN = pathlib.Path(__file__).parent / "weights" / "golden"
GREEDY = Sampling(6, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A golden model beside a vocabulary of the words w0 to w63."""
  folder = tmp_path_factory.mktemp("model") / "llama"
  shutil.copytree(GOLDEN / "llama", folder)
  words = {f"w{i}": i for i in range(64)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.save(str(folder / "tokenizer.json"))
  return folder


def run(*argv, **options):
  values = [f"--{name}={value}" for name, value in options.items()]
  with flagsaver.flagsaver():
    rest = flags.FLAGS(["generate", *argv, *values])
    binary.main(rest)


def completed(model, prompts):
  """What the binary prints of a model of the words w0 to w63."""
  found = generate(model, prompts, GREEDY, key=jax.random.key(0), eos_id=2)
  return [
    " ".join(f"w{i}" for i in [*prompt, *tokens])
    for prompt, tokens in zip(prompts, found.tokens)
  ]


def test_a_batch_of_prompts_is_completed_by_a_model_and_its_adapter(
  folder, tmp_path, capsys
):
  prompts = [[5, 7, 9], [20]]
  path = tmp_path / "prompts.txt"
  path.write_text("w5 w7 w9\nw20\n")
  options = {"model": folder, "max_tokens": 6, "temperature": 0}
  run(prompts_file=path, **options)
  base, tokenizer = binary.open_model(None, str(folder), None)
  assert tokenizer.eos_id == 2
  plain = completed(base, prompts)
  *printed, rate = capsys.readouterr().out.split("\n\n")
  assert printed == plain
  count = len(" ".join(plain).split()) - sum(map(len, prompts))
  assert re.fullmatch(rf"{count} tokens, [\d.]+ tokens/s\n", rate)
  run(prompts_file=path, adapter=GOLDEN / "lora", **options)
  adapted = load_adapter(GOLDEN / "lora", base, rngs=nnx.Rngs(0))
  *printed, _ = capsys.readouterr().out.split("\n\n")
  assert printed == completed(adapted, prompts) != plain


def test_a_run_is_completed_with_its_newest_checkpoint(
  folder, tmp_path, capsys
):
  overrides = {
    "model.name": "pretrained",
    "model.path": str(folder),
    "data.tokenizer": "model",
    "adapter.targets": "attention/v",
  }
  config = configs.check(configs.load("tiny:lora"), REGISTRIES, overrides)
  (tmp_path / "config.json").write_text(configs.to_json(config))
  planned = Run(config, flat_mesh(jax.devices()[:1]))
  trainable, frozen = planned.model.materialise()
  trained = jax.tree.map(lambda x: jnp.full_like(x, 0.5), trainable)
  with Checkpoints(tmp_path / "checkpoints", every=1, keep=2) as checkpoints:
    for step, leaves in ((1, trainable), (2, trained)):
      state = planned.initial_state(leaves)
      checkpoints.save(step, state, {"frozen": fingerprint(frozen)})
  run(workdir=tmp_path, prompt="w5 w7", max_tokens=6, temperature=0)
  printed = capsys.readouterr().out
  old, new = (
    completed(planned.module(leaves, frozen), [[5, 7]])[0]
    for leaves in (trainable, trained)
  )
  assert old != new
  assert printed.startswith(f"checkpoint step 2\n{new}\n\n")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"prompt": "a"}, "give one of --workdir and --model"),
    (
      {"prompt": "a", "model": "x", "workdir": "y"},
      "give one of --workdir and --model",
    ),
    ({"model": "x"}, "give one of --prompt and --prompts_file"),
    (
      {"prompt": "a", "prompts_file": "b"},
      "give one of --prompt and --prompts_file",
    ),
    ({"prompt": ""}, "prompt 1 is empty"),
    ({"prompt": "a", "workdir": "y", "adapter": "z"}, "a run has its own"),
    ({"prompt": "a", "workdir": "y"}, "y is no run: it has no config.json"),
    ({"prompt": "a", "model": "smolm2"}, "did you mean smollm2?"),
    ({"prompts_file": "absent.txt"}, "No such file or directory: 'absent.txt'"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be >= 1"),
    ({"prompt": "a", "top_p": 2}, "top_p must be in (0, 1], not 2.0"),
  ],
)
def test_a_bad_command_line_ends_in_one_line(
  options, message, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  _fails_with(message, **options)


def _fails_with(message, *argv, **options):
  with pytest.raises(SystemExit) as stop:
    run(*argv, **options)
  line = stop.value.code
  assert line.startswith("generate: ")
  assert message in line
  assert "\n" not in line


def test_words_of_an_unquoted_prompt_are_noticed():
  message = "unexpected argument 'capital'; quote the prompt"
  _fails_with(message, "capital", "of", model="smollm2", prompt="The")


def test_what_does_not_fit_the_model_is_said(folder, tmp_path):
  _fails_with(
    "prompt 1 of 60 tokens and 5 more exceed the model's context of 64",
    model=folder,
    prompt="w1 " * 60,
    max_tokens=5,
  )
  shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
  config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
  config["peft_type"] = "IA3"
  (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
  model = tmp_path / "model"
  shutil.copytree(GOLDEN / "llama3_tied", model)
  shutil.copyfile(folder / "tokenizer.json", model / "tokenizer.json")
  for adapter, message in (
    (GOLDEN / "lora", "the config wants"),
    (tmp_path / "lora", "peft_type 'IA3' is not supported"),
    (tmp_path / "absent", "absent"),
  ):
    _fails_with(message, model=model, prompt="w1", adapter=adapter)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(capsys):
  try:
    gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))
  prompt = "The capital of France is"
  run(model="smollm2", prompt=prompt, max_tokens=1, temperature=0)
  assert capsys.readouterr().out.startswith(f"{prompt} Paris\n\n1 tokens, ")
