"""A random two-layer Llama on the bytes of the standard library.

  python -m adaptax.experiments.train --config=tiny --workdir=runs/tiny

Trains in seconds on one CPU core: for tests, for a method's first run, for new
users. Held-out loss falls from 5.6 to about 2.9 nats/byte in 200 steps.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """`--config=tiny:lora` trains adapters on the random weights instead."""
  config = ConfigDict()
  config.steps = 200
  config.seed = 0
  config.model = {
    "name": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
  }
  config.data = {"name": "stdlib", "tokenizer": "bytes", "holdout": 0.05}
  config.adapter = {"name": "none"}
  if arg:
    config.adapter = {"name": arg, "targets": "attention/.*|mlp/.*"}
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup": 10,
  }
  config.batch_size = {"name": "constant", "micro_batches": 1}
  config.plan = {"name": "pack", "tokens": 128, "rows": 8}
  config.checkpoint = {"every": 100, "keep": 2}
  config.eval = {"every": 100, "windows": 32}
  return config
