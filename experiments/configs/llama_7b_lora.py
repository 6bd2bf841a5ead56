"""Llama-2 7B, LoRA of rank 16 on every linear map of the blocks, on a pod.

  python -m adaptax.experiments.train --config=llama_7b_lora \
      --workdir=/shared/run --config.model.name=pretrained \
      --config.model.path=DIR --config.data.name=text --config.data.path=DIR

Shapes, batch and sharding are those of `llama_7b_full`; the frozen weights are
stored in bfloat16.
"""

from ml_collections import ConfigDict

from adaptax.experiments.configs import llama_7b_full


def get_config() -> ConfigDict:
  config = llama_7b_full.get_config()
  config.model.param_dtype = "bfloat16"
  config.adapter = {
    "name": "lora",
    "targets": "attention/.*|mlp/.*",
    "rank": 16,
    "alpha": 32.0,
  }
  config.optimizer.learning_rate = 2e-4
  config.optimizer.weight_decay = 0.0
  return config
