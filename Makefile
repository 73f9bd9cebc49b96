# Every target does all its own set-up and may be run again at any time; nothing is made twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PYTHON := $(VENV)/bin/python
# In case the daemon's Python helpers share two cores with it: idle threads sleep instead of spinning.
export OMP_WAIT_POLICY ?= passive

# What clients of the contract have: its descriptors.
CONTRACT := proto/dreamfeed.v1.binpb

DEMO_TEACHER := out/demo/teacher.safetensors
# make serve TEACHER=resnet20.safetensors SERVE_FLAGS="--preset cifar10"
TEACHER ?= $(DEMO_TEACHER)
SERVE_FLAGS ?= $(if $(filter $(DEMO_TEACHER),$(TEACHER)),--preset digits)

say = printf '\033[1m==> %s\033[0m\n'

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.stamp ## Install PyTorch (for its libtorch) and the Python tools into .venv; a C++ compiler if root

$(VENV)/.stamp: requirements.txt
	@command -v cargo >/dev/null || { echo "Rust is missing: install it from https://rustup.rs, then run make again"; exit 1; }
	@if ! command -v c++ >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    $(say) "setup: installing g++, which libtorch's binding is compiled with"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++; \
	  else \
	    echo "A C++ compiler is missing: run 'sudo apt-get install g++', then make again"; exit 1; \
	  fi; \
	fi
	@python=$$(command -v python3.11 || command -v python3 || true); \
	if [ -z "$$python" ]; then echo "Python 3.11 is missing: run 'sudo apt-get install python3', then make again"; exit 1; fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$python is older than Python 3.11, which the pinned packages need"; exit 1; }; \
	if [ ! -x $(PYTHON) ] || ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  $(say) "setup: creating $(VENV)"; \
	  if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv; \
	    else \
	      echo "Python's venv is missing: run 'sudo apt-get install python3-venv', then make again"; exit 1; \
	    fi; \
	  fi; \
	  "$$python" -m venv $(VENV); \
	fi
	@$(say) "setup: installing the packages of requirements.txt (PyTorch is large; minutes the first time)"
	@$(PYTHON) -m pip install --disable-pip-version-check --no-input --require-hashes -r requirements.txt \
	  | grep --line-buffered -Ev '^(Requirement already satisfied|Ignoring )' || [ "$${PIPESTATUS[0]}" = 0 ]
	@ln -sfn "$$($(PYTHON) -c 'import os, importlib.util as u; print(os.path.relpath(os.path.dirname(u.find_spec("torch").origin), "$(VENV)"))')" $(VENV)/libtorch
	@touch $@

.PHONY: lock
lock: $(VENV)/.stamp ## Make requirements.txt of requirements.in: every package that comes along, with hashes
	@$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command "make lock" -o requirements.txt requirements.in

.PHONY: build
build: $(VENV)/.stamp ## Build the daemon, target/release/dreamfeed
	@$(say) "build: target/release/dreamfeed (the first time compiles libtorch's binding: some minutes)"
	@cargo build --release

.PHONY: demo
demo: build ## Train a teacher on real digits, dream, and teach a student with the dreams (under 4 minutes)
	@$(say) "demo: everything it makes is in out/demo"
	@$(PYTHON) examples/digits/demo.py

.PHONY: ablation
ablation: build ## The same with noise, DeepDream, DeepInversion and ADI: the paper's table
	@$(say) "ablation: everything it makes is in out/ablation"
	@$(PYTHON) examples/digits/ablation.py

.PHONY: test
test: build ## Run all tests: Rust, and the contract from Python
	@$(say) "test: Rust"
	@cargo test --release
	@$(say) "test: Python"
	@$(PYTHON) -m pytest -q tests/python

# Every room is looked at; what kills processes a hundred times, fills logs, trains or starts Python's processes is not.
FAST_RUST := delivery:: identity:: lifecycle:: limits:: log_cli:: objective_golden:: pruning:: pushing:: subscriptions::
FAST_PYTHON := breaking client contract convert export files golden stream

.PHONY: test-fast
test-fast: build ## Run what takes under two minutes of the tests, for those who wait for it
	@$(say) "test-fast: Rust"
	@cargo test --release --lib
	@cargo test --release --test it -- $(FAST_RUST)
	@$(say) "test-fast: Python"
	@$(PYTHON) -m pytest -q $(FAST_PYTHON:%=tests/python/test_%.py)

# Not a part of lint, because compiling it takes minutes. Advisories, whose database is fetched, come in with `make deny DENY=`.
CARGO_DENY := cargo-deny@0.20.2
DENY ?= licenses bans sources

.PHONY: deny
deny: ## Check licences, bans and sources of the crates (deny.toml); installs cargo-deny, which takes minutes the first time
	@command -v cargo-deny >/dev/null || cargo install --locked $(CARGO_DENY)
	@cargo deny check $(DENY)

.PHONY: lint
lint: $(VENV)/.stamp ## Check formats, lints, types and documentation: rustfmt, clippy, rustdoc, ruff, mypy, buf
	@$(say) "lint: Rust"
	@cargo fmt --check
	@cargo clippy --all-targets --release -- -D warnings
	@RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --release --lib
	@$(say) "lint: Python"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(say) "lint: proto, and that it breaks no client of $(CONTRACT)"
	@$(VENV)/bin/buf lint
	@$(VENV)/bin/buf breaking --against $(CONTRACT)

.PHONY: contract
contract: $(VENV)/.stamp ## Record the contract as clients may rely on it; refused where it breaks those of today
	@$(VENV)/bin/buf breaking --against $(CONTRACT)
	@$(VENV)/bin/buf build -o $(CONTRACT)

.PHONY: bench
bench: build ## A synthesis step beside plain PyTorch, RPCs beside a busy engine, delivery beside bare tonic
	@$(say) "bench: one optimizer step, Dreamfeed and plain PyTorch in turn"
	@$(PYTHON) benches/step.py

	@$(say) "bench: a unary RPC while the engine saturates the machine"
	@$(PYTHON) benches/latency.py
	@$(say) "bench: the log to 1, 10, 100 and 1000 subscribers, in turn with a bare tonic stream (eight minutes)"
	@$(PYTHON) benches/delivery.py
	@$(say) "bench: the Python client beside a data set in memory"
	@$(PYTHON) benches/python_client.py

SOAK_MINUTES ?= 10

.PHONY: soak
soak: build ## SOAK_MINUTES (10) of everything at once that clients and operators do to a daemon: does it grow?
	@$(say) "soak: $(SOAK_MINUTES) minutes"
	@$(PYTHON) benches/soak.py --minutes $(SOAK_MINUTES)

# What the figures in BENCHMARKS.md were measured on; any teacher and labelled file in CIFAR format do.
MODELS ?= ../shared/models
BENCH_TEACHER ?= $(MODELS)/cifar_resnet20_jpeg.safetensors
BENCH_VERIFIER ?= $(MODELS)/cifar_resnet56_jpeg.safetensors
BENCH_DATA ?= ../shared/data/cifar10-jpeg/test_batch.bin
BENCH_TRAIN ?= ../shared/data/cifar10-jpeg/train_subset.bin
BENCH_OLD ?= $(MODELS)/cifar_resnet20_first5.safetensors
BENCH_MINUTES ?= 45
BENCH_ARCH ?= resnet20
BENCH_STUDENT_ARCH ?= $(BENCH_ARCH)
BENCH_TIERS ?= adi,warm-adi,fast,hybrid
NORMALIZATION := --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

.PHONY: bench-dreams
bench-dreams: build ## 256 images of the CIFAR teacher by DeepInversion in 2,000 steps: time, and who recognizes them
	@$(say) "bench-dreams: about a quarter of an hour on two cores"
	@OMP_WAIT_POLICY=active target/release/dreamfeed dream --teacher $(BENCH_TEACHER) --arch resnet20 $(NORMALIZATION) \
	  --preset cifar10 --compete-weight 0 --batch-size 256 --images 256 --iterations 2000 --seed 1 \
	  --verifier $(BENCH_VERIFIER) --verifier-arch resnet56 --grid out/bench/dreams.png

.PHONY: bench-distill
bench-distill: build ## The teacher to a random student (ResNet-20 both), BENCH_MINUTES (45) by the clock for each of BENCH_TIERS
	@$(say) "bench-distill: $(BENCH_MINUTES) minutes for each of $(BENCH_TIERS)"
	@$(PYTHON) benches/distill.py --teacher $(BENCH_TEACHER) --data $(BENCH_DATA) --minutes $(BENCH_MINUTES) \
	  --tiers $(BENCH_TIERS) --arch $(BENCH_ARCH) --student-arch $(BENCH_STUDENT_ARCH)

.PHONY: bench-prune
bench-prune: build ## A ResNet-56 without 20, 40 and 60 % of its FLOPs, fine-tuned on dreams, real pictures, noise, nothing
	@$(say) "bench-prune: about half an hour on two cores"
	@$(PYTHON) benches/prune.py --model $(BENCH_VERIFIER) --data $(BENCH_TRAIN) --test-data $(BENCH_DATA)

.PHONY: bench-continual
bench-continual: build ## Five classes more for a network of five: plain fine-tuning, LwF.MC, DeepInversion, ABD
	@$(say) "bench-continual: about a quarter of an hour on two cores"
	@$(PYTHON) benches/continual.py --model $(BENCH_OLD) --data $(BENCH_TRAIN) --test-data $(BENCH_DATA)

.PHONY: serve
serve: build ## Run the daemon: TEACHER=FILE (default: the demo's), SERVE_FLAGS="..."
	@if [ "$(TEACHER)" = "$(DEMO_TEACHER)" ]; then $(PYTHON) examples/digits/train_teacher.py --out-dir out/demo; fi
	@$(say) "serve: dreaming from $(TEACHER)"
	@exec target/release/dreamfeed serve --teacher "$(TEACHER)" $(SERVE_FLAGS)

.PHONY: clean
clean: ## Remove what was built and made (out, target); .venv stays, "make distclean" removes that too
	rm -rf out target

.PHONY: distclean
distclean: clean
	rm -rf $(VENV)
