"""Packaging of adaptax: every top folder becomes a package under one name."""

import pathlib

import setuptools

FOLDERS = (
  "layers",
  "optim",
  "parallel",
  "pallas_kernels",
  "experiments",
  "research",
)

packages = [
  package
  for folder in FOLDERS
  for package in (
    f"adaptax.{folder}",
    *(f"adaptax.{folder}.{sub}" for sub in setuptools.find_packages(folder)),
  )
]

# jax and flax pair up by minor release: flax 0.12.8 is the last that supports
# jax 0.10 (and Python 3.11), flax 0.12.12 the first for jax 0.11.1 and later.
FRAMEWORK = [
  "jax==0.10.2; python_version < '3.12'",
  "flax==0.12.8; python_version < '3.12'",
  "jax>=0.12; python_version >= '3.12'",
  "flax>=0.12.12; python_version >= '3.12'",
]

setuptools.setup(
  name="adaptax",
  version="0.1.0",
  description=(
    "JAX research codebase for training that adapts: parameter-efficient"
    " adapters, adaptive optimizers, per-batch sequence-parallel layouts"
  ),
  license="Apache-2.0",
  license_files=["LICENSE"],
  long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  python_requires=">=3.11",
  package_dir={f"adaptax.{folder}": folder for folder in FOLDERS},
  packages=packages,
  package_data={"adaptax.experiments": ["configs/*.py"]},
  install_requires=[
    *FRAMEWORK,
    "absl-py>=2.1",
    "grain>=0.2.18",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tensorboardX>=2.6",
    "tokenizers>=0.21",
  ],
  extras_require={
    "test": [
      "hypothesis>=6.100",
      "mypy>=1.15",
      "pytest>=8.3",
      "pytest-xdist>=3.6",
      "ruff>=0.12",
    ],
    "tpu-aot": ["libtpu"],
    "gpu": ["jax[cuda12]"],
    "interop": ["peft>=0.21", "torch>=2.6", "transformers>=5.0"],
  },
)
