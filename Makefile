.DEFAULT_GOAL := help
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

NP ?= 2# ranks for `make train`
export TARGET ?= cpu# image that `make image-test` builds
ARGS ?=# more arguments for train.py, e.g. ARGS="train.epochs=1"
uv_version := 0.13.9# pinned, so that two people's locks differ only by what changed upstream

# One lock serves Python 3.9, 3.10 and 3.11. The GPU lock takes its versions from the CPU lock, so that both train with
# the same code, and leaves out `dev`: a GPU machine (or image) trains; tests, lint and plots run in the CPU one.
lock := pip compile --quiet --upgrade --universal --python-version 3.9 --no-python-downloads --generate-hashes \
	--custom-compile-command 'make lock' pyproject.toml

.PHONY: help setup train test test-slow test-faults test-browser test-cluster test-slurm image-test doctor kubernetes bench bench-peers \
	tensorboard screenshots docs lint lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## everything that a fresh machine needs: .venv, Horovod, Fashion-MNIST
	@launch/setup.sh

# run.dir is fresh each time, so that a second `make train` neither collides with the first nor resumes it.
train: setup ## set up, then train on this machine (NP=2 ARGS="key=value ...")
	@launch/local.sh -np $(NP) run.dir=runs/$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup ## set up, then all tests except the slow ones and test-faults
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m 'not slow' --ignore=tests/faults --ignore=tests/image $(ARGS)

test-slow: setup ## set up, then the slow tests
	@.venv/bin/python -m pytest -m slow --ignore=tests/image $(ARGS)

test-faults: setup ## break what can break, and print a table of what held (SLOW=1: also kill 100 times at random)
	@.venv/bin/python -m pytest -q --fault-matrix -m 'fault $(if $(SLOW),,and not slow)' tests/faults tests/unit/checkpoints \
		tests/parallel/test_resume.py $(ARGS)

doctor: ## is this machine fit? a table of checks, with what to do (ARGS="-np 8 key=value ...")
	@PATH=$(CURDIR)/.venv/bin:$$PATH python3 job/doctor.py $(ARGS)

test-cluster: setup ## launch/cluster.sh on three hosts, which are network namespaces of this machine (needs root)
	@.venv/bin/python -m pytest -v tests/cluster $(ARGS)

test-slurm: setup ## launch/slurm.sbatch under a real Slurm of two nodes on this machine (needs slurm-wlm and root)
	@.venv/bin/python -m pytest -v tests/slurm $(ARGS)

image-test: setup ## build the image without Docker and run it (TARGET=cpu or gpu; needs root, buildah, debootstrap)
	@.venv/bin/python -m pytest -m slow tests/image $(ARGS)

test-browser: setup ## TensorBoard and the report, seen in a headless Chromium (Debian: chromium, chromium-driver)
	@.venv/bin/python -m pytest tests/browser $(ARGS)

bench: setup ## measure what SyncBatchNorm, a checkpoint, TensorBoard and a start cost
	@PATH=$(CURDIR)/.venv/bin:$$PATH python -m benchmarks.step_time
	@.venv/bin/python -m benchmarks.checkpoint_cost
	@.venv/bin/python -m benchmarks.tensorboard_cost
	@.venv/bin/python -m benchmarks.start_up

bench-peers: setup ## this project beside PyTorch DDP, Flax, Horovod's recipe and the tutorial (needs a package index; 15 minutes)
	@PATH=$(CURDIR)/.venv/bin:$$PATH python -m benchmarks.compare $(ARGS)

tensorboard: setup ## show all runs under runs/ in a browser, at the address that it prints (ARGS="--port 6007")
	@[[ -d runs ]] || { echo "runs/ is not there yet; \`make train\` makes the first run" >&2; exit 2; }
	@.venv/bin/python -m tensorboard.main --logdir runs $(ARGS)

kubernetes: setup ## check the manifests of launch/kubernetes without a cluster (needs kubectl)
	@for overlay in launch/kubernetes/overlays/*; do \
		.venv/bin/python launch/kubernetes/validate.py launch/kubernetes/once $$overlay || exit; \
	done

screenshots: setup ## make runs, and draw the pictures in docs/images/ from them: a quarter of an hour
	@.venv/bin/python -m benchmarks.screenshots
	@.venv/bin/python -m benchmarks.rank_curves

docs: setup ## make docs/configuration.md anew from job/config.py
	@.venv/bin/python -m job.config > docs/configuration.md

lint: setup ## ruff, mypy, and import-linter: no room of job/ imports a room above it
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/lint-imports

lock: ## make requirements-*.txt anew from pyproject.toml
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	python3 -m venv "$$tmp" && "$$tmp/bin/python" -m pip install -q uv==$(uv_version) && \
	"$$tmp/bin/uv" $(lock) --extra cpu --extra build --extra dev -o requirements-cpu.txt && \
	"$$tmp/bin/uv" $(lock) --extra gpu --extra build --constraint requirements-cpu.txt -o requirements-gpu.txt

clean: ## remove .venv and caches; runs/ and the data stay
	rm -rf .venv .setup .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
