# Two commands: `make demo` shows a layer run, `make test` runs every test. Each sets up what it needs (system packages
# where it may, a virtual environment in .venv, the build in build/dev) and does again only what has changed.
#
#   make demo | test | check-msl | bench | lint | format | build | check-apple | wheel-macos | clean
#
# check-apple and wheel-macos prove on Linux that the macOS side compiles and links, and assemble a wheel of it.
#
# PYTHON chooses the interpreter, JOBS the number of compilers at a time, PYTEST_ARGS what pytest is given,
# METAL_MOE_KERNEL_COMPILER (environment) the compiler of the kernels.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-cpp test-python check-msl bench lint format build check-apple wheel-macos clean

# The first interpreter that the package supports.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.{13,12,11,14,10}; do "$$p" -c \
  'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo "$$p" && break; done)
endif
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# macOS: PyTorch and metal-cpp are needed to build, and tests run on the GPU.
MACOS := $(filter Darwin,$(shell uname))
PYTEST_ARGS ?= $(if $(MACOS),--device mps)

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev
SYSTEM := build/system.env
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := CMakeLists.txt pyproject.toml constraints.txt README.md LICENSE \
  $(shell find kernels csrc cmake python -type f -not -name '*.pyc')

export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# The virtual environment's cmake and ninja, for pip's build and for our own calls alike.
export PATH := $(CURDIR)/$(BIN):$(PATH)

demo: $(INSTALLED)
	$(BIN)/metal-moe demo

# The C++ tests are of the stand-in for Metal, and of the core on top of it.
test: $(if $(MACOS),,test-cpp) test-python

test-cpp: $(INSTALLED)
	@. $(SYSTEM); [ $$TESTS = ON ] || { echo "make test: the C++ tests need GoogleTest (Debian and Ubuntu: libgtest-dev);" \
	  "install it and remove $(SYSTEM), or run make test-python"; exit 1; }
	@. $(SYSTEM); targets=cpp_tests; [ $$BENCH = OFF ] || targets+=' benchmarks'; \
	  set -x; cmake --build $(BUILD) --target $$targets
	ctest --test-dir $(BUILD) -LE bench --output-on-failure

test-python: $(INSTALLED)
	@. $(SYSTEM); [ $$TYPING = ON ] || export METAL_MOE_ALLOW_NO_CLANG=1; $(BIN)/python -m pytest $(PYTEST_ARGS)

# Needs Python and clang alone, and no build.
check-msl: $(SYSTEM)
	@. $(SYSTEM); [ $$TYPING = ON ] || { echo "make check-msl: no clang of version 19 or later (Debian and Ubuntu:" \
	  "clang-19); install it and remove $(SYSTEM)"; exit 1; }
	$(PYTHON) tools/check_msl.py

bench: $(INSTALLED)
	@. $(SYSTEM); [ $$BENCH = ON ] || { echo "make bench: the C++ benchmarks need Google Benchmark (Debian and Ubuntu:" \
	  "libbenchmark-dev); install it and remove $(SYSTEM)"; exit 1; }
	cmake --build $(BUILD) --target benchmarks
	ctest --test-dir $(BUILD) -L bench --verbose
	for script in bench/*.py; do $(BIN)/python "$$script"; done

# The headers of Metal's own names have no extension; those in scan/ are empty.
FORMATTED = $(shell git ls-files 'kernels/*.h' 'kernels/*.metal' 'csrc/*.h' 'csrc/*.hpp' 'csrc/*.cpp' 'csrc/*.mm' \
  'csrc/sim/msl/metal_*' 'tests/*.h' 'tests/*.metal' 'tests/*.cpp' 'tools/*.h' 'bench/*.h' 'bench/*.cpp')

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "clang-format --dry-run --Werror (C++ and Metal files)"
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(INSTALLED)

# What is downloaded and built lies in build/apple and serves the next time.
check-apple: $(TOOLS)
	$(BIN)/python tools/check_apple.py
	$(BIN)/python -m pytest --quiet tools/apple/tests

wheel-macos: $(TOOLS)
	$(BIN)/python tools/wheel_macos.py

clean:
	rm -rf $(VENV) build

$(SYSTEM): tools/system_packages.sh
	@[ -n "$(PYTHON)" ] || { echo "make: no Python from 3.10 to 3.14 found; name one with PYTHON=..."; exit 1; }
	@tools/system_packages.sh "$(PYTHON)" build
	@touch $@

# What builds the package, by name: without build isolation, so that a second build finds the first one's files.
$(TOOLS): $(SYSTEM) constraints.txt
	@echo "make: setting up $(VENV)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet -c constraints.txt 'scikit-build-core>=0.11' 'pybind11>=2.13.6' 'cmake>=3.24' ninja \
	  'pytest>=8' $(if $(MACOS),torch mlx-metal)
	@touch $@

# The package as a user gets it, with all it depends on. The first time pip shows what it downloads. CMake's files stay in $(BUILD) and serve the C++ tests too.
$(INSTALLED): $(TOOLS) $(SOURCES)
	@echo "make: building and installing metal_moe (minutes the first time, seconds after that)"
	@. $(SYSTEM); [ -x $(BIN)/metal-moe ] && quiet=--quiet || quiet=; \
	  CMAKE_PREFIX_PATH="$$PREFIX" $(PIP) install $$quiet --no-build-isolation -c constraints.txt \
	  --config-settings=build-dir=$(BUILD) \
	  --config-settings=cmake.define.METAL_MOE_BUILD_TESTS=$$TESTS \
	  --config-settings=cmake.define.METAL_MOE_BUILD_BENCH=$$BENCH \
	  '.[dev]'
	@touch $@
