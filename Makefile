# Everything a contributor runs. Each target makes .venv and installs what it needs first.
.DEFAULT_GOAL := help
.PHONY: help demo test bench fuzz soak lint types format clean
FRAMEWORK ?= torch
ARGS ?=

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Keras on the backend that the demo has anyway; name another one that is installed to use it.
demo: export KERAS_BACKEND ?= torch
demo: ## three leaves train together on this machine (FRAMEWORK=torch|lightning|keras, ARGS="--rabbitmq")
	@scripts/environment.sh demo-$(FRAMEWORK)
	@.venv/bin/branchkey-integrations demo --framework $(FRAMEWORK) $(ARGS)

test: ## install what is missing, RabbitMQ included, and run all tests (ARGS="-k name" goes to pytest)
	@scripts/test.sh $(ARGS)

bench: ## measure rounds beside the official client's and write docs/BENCHMARKS.md (ARGS="--quick", ARGS=--help)
	@scripts/environment.sh demo-torch
	@.venv/bin/python -m benchmarks $(ARGS)

fuzz: ## throw hostile bytes at the parsers (ARGS="--inputs 1000000 --target archive")
	@scripts/environment.sh dev
	@.venv/bin/python -m fuzz $(ARGS)

soak: ## four leaves, 500 rounds, a branch that does its worst (ARGS="--rounds 100 --rabbitmq")
	@scripts/environment.sh demo-torch
	@.venv/bin/python -m benchmarks.soak $(ARGS)

lint: ## check style
	@scripts/environment.sh dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: ## check types
	@scripts/environment.sh dev
	@.venv/bin/mypy

format: ## rewrite the code in the project's style
	@scripts/environment.sh dev
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean: ## remove what the targets above made, .venv included
	rm -rf .venv .tox .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
