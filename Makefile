# Every target sets up what it needs: a .venv with the locked set, once.
PYTHON ?= python3.11
VENV ?= .venv
GPU_PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export PYTHONUNBUFFERED := 1
export OMP_WAIT_POLICY ?= passive
export KMP_BLOCKTIME ?= 0

.DEFAULT_GOAL := help
.PHONY: help chaos soak install install-dev demo base lint format test test-fast test-slow test-architectures docs bench bench-online lock clean clean-runs affected fuzz test-gpu gpu-check triton

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@echo "Installing the locked set into $(VENV) (about 3 GB, once) ..."
	@# The lock names the CPU build of torch. PyPI does not have it, so where pip's own
	@# configuration provides none it comes from PyTorch's CPU wheel index.
	@torch=$$(grep '^torch==' requirements/cpu.txt); \
	$(PIP) install -qq --no-deps "$$torch" 2>/dev/null || \
	$(PIP) install -qq --no-deps --index-url $(TORCH_CPU_INDEX) "$$torch"
	@$(PIP) install -qq --no-deps -r requirements/cpu.txt
	@$(PIP) install -qq --no-deps -e .
	@$(BIN)/raylign --help >/dev/null
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	@$(PIP) install -qq --no-deps -r requirements/dev.txt
	@touch $@

install: $(VENV)/.installed ## Set up .venv with the locked CPU set and the project
install-dev: $(VENV)/.installed-dev ## The same plus the tools that the tests need

demo: install ## SFT -> reward -> DPO -> PPO on the embedded model, with table and report, in runs/demo
	$(BIN)/raylign run configs/demo.yaml

base: install ## Train the embedded base anew from its recipe and put it into assets/
	$(BIN)/raylign run configs/base.yaml
	$(BIN)/python -m actors.models.tiny runs/base/pretrain/model assets/tiny-moe

lint: install-dev ## Format, rules, types, and which room may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

format: install-dev ## Put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint test-fast ## Lint, then every test but the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "(ray or vllm or trl or ranks) and not slow"

triton: $(VENV)/triton/.installed ## Triton for the test of the digest kernel, beside the locked set (0.25 GB)
$(VENV)/triton/.installed: | $(VENV)/.installed
	@# No test but that one needs it: where it can't be had, that one is skipped and says so.
	-@$(PIP) install -qq --no-deps --no-compile --target $(VENV)/triton triton==3.8.0 && touch $@

test-fast: install-dev triton ## The tests that need no other process: no Ray, vLLM, TRL or second rank, in two processes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not ray and not vllm and not trl and not ranks"

affected: install-dev ## The tests that a change can reach, by imports; FAST=1: no Ray, no vLLM; SINCE=REVISION
	$(BIN)/python -m tests.affected $(if $(SINCE),--since $(SINCE)) $(if $(FAST),--fast)

test-gpu: ## The tests that need a card, with GPU_PYTHON; elsewhere they are skipped and say so
	$(GPU_PYTHON) -m pytest -q -m gpu

gpu-check: ## The first run on a GPU, eight minutes at most (GPU_PYTHON: a Python with CUDA's torch)
	$(GPU_PYTHON) -m benchmarks.gpu_check

fuzz: install-dev ## Made-up configs, overrides, data and run directories, for FUZZ_SECONDS (600)
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(BIN)/python -m pytest -q -n 2 tests/fuzz

chaos: install-dev ## Lose every process at every phase, an hour; the tables go into docs/chaos.md (CELLS, SEEDS, PATIENCE)
	$(BIN)/python -m tests.chaos $(if $(CELLS),--cells $(CELLS)) $(if $(SEEDS),--seeds $(SEEDS)) --patience $(or $(PATIENCE),1)

soak: install-dev ## 500 steps with a kill every 25: does anything grow? The slopes go into docs/chaos.md
	$(BIN)/python -m tests.chaos.soak --patience $(or $(PATIENCE),1)

test-slow: install-dev ## The longer checks
	$(BIN)/python -m pytest -q -m "slow" --timeout 1800

test-architectures: install-dev ## Every row of the table of architectures, trainer and engine; figures go into the docs
	RAYLIGN_ARCHITECTURE_RESULTS=$(CURDIR)/docs/architectures.json \
	$(BIN)/python -m pytest -q -m "architectures" --timeout 1800
	$(MAKE) docs

docs: install ## docs/architectures.md from the table and the last figures
	$(BIN)/python -m pipeline.report.architecture_page

bench: install-dev ## Side-by-side ratios against TRL + PEFT and a bare loop
	$(BIN)/python -m benchmarks.offline

bench-online: install-dev ## GRPO against TRL, generation, sync, overlap, driver, a PPO step and start-up
	@for name in grpo rollout sync overlap driver profile_ppo startup; do \
	$(BIN)/python -m benchmarks.$$name || exit 1; done

lock: install ## Resolve the requirements anew into requirements/*.txt
	$(BIN)/python requirements/refresh.py

clean: ## Remove caches (runs and the .venv stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-runs: ## Remove runs/: every run's adapters, checkpoints and reports
	rm -rf runs
