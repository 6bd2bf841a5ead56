"""Llama-2 7B, all weights trained in bfloat16 with float32 masters, on a pod.

  python -m adaptax.experiments.train --config=llama_7b_full \
      --workdir=/shared/run --config.data.name=text --config.data.path=DIR

16,384 tokens a chip, fully sharded; made for 64 TPU v5p chips. The weights are
random unless model.name=pretrained and model.path name a folder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.steps = 1000
  config.seed = 0
  config.model = {
    "name": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "dtype": "bfloat16",
    "remat": "attention",
  }
  config.data = {"name": "stdlib", "tokenizer": "bytes", "holdout": 0.05}
  config.adapter = {"name": "none"}
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 2e-5,
    "schedule": "cosine",
    "warmup": 50,
    "b2": 0.95,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
  }
  config.batch_size = {"name": "constant", "micro_batches": 1}
  config.plan = {"name": "pack", "tokens": 16384, "rows": 64}
  config.loss_chunk = 2048
  config.checkpoint = {"every": 200, "keep": 2}
  config.eval = {"every": 200, "windows": 64}
  return config
