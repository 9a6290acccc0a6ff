# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## virtual environment in .venv with the pinned packages

$(VENV)/.ready: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dvc,kfp,s3,dev]'
	$(BIN)/pip check
	@cd / && $(CURDIR)/$(BIN)/python -c 'import torchvision' 2>/dev/null || $(CURDIR)/$(BIN)/python -c 'from diffstill.torchvision_shim import install; print("torchvision was built for another torch, so its own operators are missing;", install(), "lets it load")'
	touch $@

demo: setup  ## the whole chain on the embedded digits, in build/demo
	@mkdir -p $(DEMO)
	@cp params.yaml $(DEMO)/
	@cd $(DEMO) && $(CURDIR)/$(BIN)/diffstill run

lock: setup  ## run the chain under DVC, in build/lock, and make its dvc.lock the committed one
	@mkdir -p build/lock
	@cp dvc.yaml params.yaml build/lock/
	@ln -sfn ../../src build/lock/src
	@cd build/lock && export PATH="$(CURDIR)/$(BIN):$$PATH" DVC_NO_ANALYTICS=1 MLFLOW_TRACKING_URI=none \
		&& { [ -d .dvc ] || dvc init --quiet --no-scm; } && dvc config core.check_update false && dvc repro
	cp build/lock/dvc.lock dvc.lock

test: setup  ## all tests that need no service of their own
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## the tests that take minutes each
	$(BIN)/python -m pytest -n 2 --dist load -m slow

test-infra: setup  ## render and check what is in infra/; needs kubectl 1.30 or newer
	DIFFSTILL_INFRA=yes $(BIN)/python -m pytest -n 2 tests/infra

BENCH = $(BIN)/python -m benchmarks

bench: setup  ## all benchmarks at sizes for a CPU, one after the other; leave the machine alone meanwhile
	$(BENCH).finetune --device cpu --batch 8 32
	$(BENCH).finetune --device cpu --batch 8 --ablate
	$(BENCH).memory --device cpu --batch 8 64 256 --steps 5 --warm 1
	$(BENCH).sample --device cpu --batch 16 --sampler-steps 10
	$(BENCH).students
	$(BENCH).students --student convnet-3 --side 28 --channels 1
	$(BENCH).prepare
	$(BENCH).encode
	$(BIN)/python benchmarks/upload.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/startup.py

bench-gpu: setup  ## the benchmarks of DiT-XL/2 at 256 px, on a CUDA device
	$(BENCH).finetune --device cuda --size xl --batch 8 64 --compile
	$(BENCH).finetune --device cuda --size xl --batch 8 64 --compile --ablate
	$(BENCH).finetune --device cuda --size xl --batch 8 --compile --trace build/trace.json
	$(BENCH).memory --device cuda --batch 8 64 256 --steps 50
	$(BENCH).sample --device cuda --size xl --batch 100 --compile
	$(BENCH).students --device cuda --student resnetap-10 --side 128 --workers 8
	$(BENCH).encode --device cuda --images 4096 --side 256 --widths 128 256 512 512 --layers 2 --precision bf16
	$(BENCH).recipe --device cuda --size xl

check: setup  ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/codespell src components pipelines docker infra tests docs benchmarks examples README.md CHANGELOG.md Makefile dvc.yaml

DOCKER ?= docker
TARGETS ?= cpu
VERSION = $(shell sed -nE 's/^__version__ = "(.*)"/\1/p' src/diffstill/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
# What `make images-base` has pinned, else the tag that the Dockerfile names.
BASE = $(or $(shell cat docker/base.lock 2>/dev/null),$(shell sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile))
# Of a remote, no credentials.
SOURCE = $(or $(shell git config --get remote.origin.url | sed -E 's,//[^/@]*@,//,'),unknown)
# The time is the commit's, so that the same commit makes the same image.
CREATED = $(shell git log -1 --format=%cI 2>/dev/null)
OCI = --label org.opencontainers.image
LABELS = $(OCI).version=$(VERSION) $(OCI).revision=$(REVISION) $(OCI).source='$(SOURCE)' $(OCI).created=$(CREATED) \
	$(OCI).base.name=$(firstword $(subst @, ,$(BASE))) $(OCI).base.digest=$(word 2,$(subst @, ,$(BASE)))

images:  ## container images; TARGETS="cpu gpu mlflow" builds all three, BUILD_OPTIONS go to docker build
	@$(if $(findstring @sha256:,$(BASE)),,echo "warning: base image $(BASE) is not pinned: the next build may differ; make images-base pins it" >&2)
	@for target in $(TARGETS); do DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --target $$target --tag diffstill:$$target \
		--build-arg BASE_IMAGE=$(BASE) --build-arg REVISION=$(REVISION) $(LABELS) $(BUILD_OPTIONS) . || exit; done
	@$(DOCKER) image ls --format '{{.Repository}}:{{.Tag}}  {{.Size}}' diffstill

images-base: setup  ## pin the base image by its digest, in docker/base.lock
	@DOCKER=$(DOCKER) $(BIN)/python docker/base.py

images-sbom: setup  ## bills of materials (CycloneDX) of built images, in build/sbom
	@DOCKER=$(DOCKER) $(BIN)/python docker/sbom.py $(TARGETS)

images-lint: setup  ## lint the Dockerfile (`make check` does so too)
	$(BIN)/hadolint docker/Dockerfile

images-push: setup  ## push to REGISTRY=host/name and write docker/images.lock
	@DOCKER=$(DOCKER) $(BIN)/python docker/push.py --registry '$(REGISTRY)' $(PUSH_OPTIONS) $(TARGETS)

test-containers: setup  ## build the images and test them; root, Docker is installed and started where missing
	@tests/containers/run

test-stack: setup  ## tests against Ceph, PostgreSQL and MLflow's server; installs what is missing as root
	@tests/stack/run

ENGINE ?= auto
STACK = $(BIN)/python -m infra.local

stack: setup  ## MLflow's server, PostgreSQL and an S3 server on this machine; ENGINE=compose, native, or what can be had
	@$(STACK) up --engine $(ENGINE)

stack-down: setup  ## end them; WIPE=yes deletes their data
	@$(STACK) down $(if $(filter yes,$(WIPE)),--delete-data)

stack-status: setup  ## which of them run
	@$(STACK) status

stack-backup: setup  ## database and buckets into TO=folder
	@$(STACK) backup '$(TO)'

stack-restore: setup  ## FROM=folder into an empty stack
	@$(STACK) restore '$(FROM)'

stack-rotate: setup  ## replace the passwords of the stack
	@$(STACK) rotate

ui: setup  ## browse the demo's runs in MLflow
	cd $(DEMO) && $(CURDIR)/$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

clean:  ## remove the demo and all caches, keep the environment and the data of the stack
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name stack -exec rm -rf {} +
	rm -rf .diffstill .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo lock test test-slow test-infra check images images-base images-sbom images-lint images-push test-containers test-stack \
	stack stack-down stack-status stack-backup stack-restore stack-rotate ui clean
