# `make help` lists the targets. Everything is installed into $(VENV) and built under build/; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
# Where the CPU build of torch comes from when the indexes that pip is configured with do not have it.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
# Appended to the commands, for example `make test ARGS="-k attention"` or `make demo ARGS="--image cat.jpg"`.
ARGS ?=
# At most; each takes up to 7 GiB of memory in the end.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PINS := constraints.txt pyproject.toml
# Directories too: adding or removing a file changes only their time.
COMPILED := CMakeLists.txt $(shell find cmake csrc)
HOSTS := timm torchvision
# Of the Tritons that pyproject.toml asks for the oldest, which the tests compile with besides the pinned one.
OLDEST_TRITON := triton==$(shell sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml)
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu bench sanitize lint typecheck format clean

help:
	@echo 'make demo    CvT-13 stock against accelerated on photographs'
	@echo 'make test    all tests'
	@echo 'make bench   the benchmark suites'
	@echo 'make test-gpu  on a GPU: its kernels against the rule, graphs, whole models, by PYTHON as for sanitize'
	@echo 'make sanitize  on a GPU: the CUDA kernels under compute-sanitizer, by PYTHON, whose torch must be built for CUDA'
	@echo 'make lint    formatting, static checks and types'
	@echo 'make format  rewrite the sources in the project style'
	@echo 'make clean   remove everything that make created'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX_URL=$(TORCH_INDEX_URL) ARGS=$(ARGS) TEST_PROCESSES=$(TEST_PROCESSES)'

demo: $(VENV)/demo.stamp
	$(BIN)/fastvit-kernels demo $(ARGS)

test: $(VENV)/test.stamp $(VENV)/hosts.stamp $(VENV)/oldest-triton.stamp
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses $(TEST_PROCESSES) --dist loadgroup $(ARGS)

bench: $(VENV)/bench.stamp
	$(BIN)/fastvit-kernels bench $(ARGS)

# Neither is from $(VENV), whose torch is the CPU build. An installed wheel has what the sources beside the tests lack, which
# must not be found first; and here nothing is interpreted.
test-gpu:
	@PYTHONSAFEPATH=1 TRITON_INTERPRET=0 tools/missing-on-gpu.sh $(PYTHON)
	PYTHONSAFEPATH=1 TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/cuda/test_device.py $(ARGS)

sanitize:
	@tools/sanitize.sh $(PYTHON) $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(MAKE) --no-print-directory typecheck

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# models/ and bench/ are installed inside the package; mypy follows no import hook, so it is shown that layout.
typecheck: $(VENV)/dev.stamp
	rm -rf build/typecheck && mkdir -p build/typecheck/fastvit_kernels
	ln -s $(CURDIR)/fastvit_kernels/* $(CURDIR)/models $(CURDIR)/bench build/typecheck/fastvit_kernels/
	MYPYPATH=build/typecheck $(BIN)/mypy -p fastvit_kernels

$(VENV)/python.stamp:
	@tools/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch without its requirements: pip resolves those, pinned, together with everything else.
$(VENV)/torch.stamp: $(VENV)/python.stamp constraints.txt
	$(PIP) install --constraint constraints.txt pip setuptools scikit-build-core cmake ninja
	@echo 'installing $(TORCH)'
	@$(PIP) install --no-deps $(TORCH) 2>/dev/null \
	    || $(PIP) install --no-deps --index-url $(TORCH_INDEX_URL) $(TORCH) \
	    || { echo 'missing: $(TORCH) for this Python, from $(TORCH_INDEX_URL); name another index with TORCH_INDEX_URL=' >&2; exit 1; }
	touch $@

# One rule for every extra of pyproject.toml; an installation that only compiled sources made old takes seconds.
$(VENV)/%.stamp: $(VENV)/torch.stamp $(PINS) $(COMPILED)
	$(PIP) install --no-build-isolation --constraint constraints.txt --editable '.[$*]'
	touch $@

# Libraries whose models the tests compare with, in a folder that only tests/timm_host.py makes known: the torchvision of the
# package index is built for CUDA, and where transformers finds it beside a CPU torch it cannot be imported any more.
# Without their requirements, which would bring another torch; the extra `test` has installed the rest.
$(VENV)/hosts.stamp: $(VENV)/torch.stamp constraints.txt
	$(PIP) install --no-deps --constraint constraints.txt --upgrade --target $(VENV)/hosts $(HOSTS)
	touch $@

$(VENV)/oldest-triton.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --no-deps --upgrade --target $(VENV)/oldest-triton $(OLDEST_TRITON)
	touch $@

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
