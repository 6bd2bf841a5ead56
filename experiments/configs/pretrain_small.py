"""A Llama of 10M parameters from scratch on the standard library's text.

  python -m adaptax.experiments.train --config=pretrain_small \
      --workdir=runs/pretrain_small

Bytes are the vocabulary, so that the parameters sit in the blocks.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.steps = 1000
  config.seed = 0
  config.model = {
    "name": "llama",
    "vocab_size": 259,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_layers": 8,
    "num_heads": 5,
    "num_kv_heads": 5,
    "tie_embeddings": True,
  }
  config.data = {"name": "stdlib", "tokenizer": "bytes", "holdout": 0.05}
  config.adapter = {"name": "none"}
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup": 100,
    "final": 0.1,
    "b2": 0.95,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
  }
  config.batch_size = {"name": "constant", "micro_batches": 1}
  config.plan = {"name": "pack", "tokens": 512, "rows": 8}
  config.checkpoint = {"every": 100, "keep": 2}
  config.eval = {"every": 200, "windows": 32}
  return config
