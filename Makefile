# Two commands do all set-up: `make demo` and `make test`. Everything else is a part of them.
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export MUJOCO_GL ?=
# Tests run small networks in several processes: more threads than one each only get in each other's way.
unit mujoco4 lerobot wheel: export OMP_NUM_THREADS := 1

.PHONY: help setup demo test lint types unit mujoco4 lerobot wheel clean

help: ## this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: ## create .venv with everything the tests and the demo need
	@bash scripts/system_libraries.sh $(PYTHON)
	@PYTHON=$(PYTHON) bash scripts/make_env.sh

demo: setup ## demonstrations -> policy -> fine-tuned -> evaluated, with report and video (about 6 minutes)
	@$(BIN)/robopost demo

test: lint types unit mujoco4 lerobot wheel ## everything continuous integration runs

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	@$(BIN)/pyright

unit: setup ## the test suite in .venv
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/lerobot

mujoco4: setup ## the environments once more on the newest MuJoCo
	@bash scripts/test_mujoco4.sh

lerobot: setup ## LeRobot datasets written and read through the lerobot package, in its own environment
	@PYTHON=$(PYTHON) bash tests/envs/make_lerobot_env.sh
	@.venv-lerobot/bin/python -m pytest tests/lerobot

wheel: setup ## the built wheel, in an empty environment, trains from an empty folder
	@PYTHON=$(PYTHON) bash scripts/test_wheel.sh

clean: ## remove environments and build products
	rm -rf .venv .venv-* dist build .pytest_cache .ruff_cache
