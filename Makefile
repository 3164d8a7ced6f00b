# make help | setup | train | test | test-fast | test-once | lint | notebooks | kernels
#
# Everything runs in its own virtual environment. Another Python, environment or accelerator:
#   make test PYTHON=python3.13 VENV=.venv-newest
#   make setup REQUIREMENTS=requirements-gpu.txt
#   make kernels TARGET=h200 PYTHON=python3.13

PYTHON       ?= python3
VENV         ?= .venv
REQUIREMENTS ?= requirements.txt
CONFIG       ?= configs/yocou_small.py
TARGET       ?= v6e
ARGS         ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast test-once lint notebooks kernels

help:
	@echo "make setup      make $(VENV) and install $(REQUIREMENTS) into it (once)"
	@echo "make train      setup, then train $(CONFIG); ARGS='--workdir=runs/short --config.run.steps=50' is passed on"
	@echo "make test       setup, then the whole test suite"
	@echo "make test-fast  setup, then all tests but those that are marked slow"
	@echo "make test-once  setup, then each of these tests with one of its cases"
	@echo "make lint       setup, then ruff's checks, its format check, and the types of the arithmetic"
	@echo "make notebooks  setup, then build the notebooks from their sources; ARGS=--check compares and runs them"
	@echo "make kernels    compile the attention kernels for $(TARGET): v5e, v5p, v6e, tpu7x, h200 or a100"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) REQUIREMENTS=$(REQUIREMENTS) CONFIG=$(CONFIG) ARGS="

# The tested versions differ by Python, because jax 0.10.2 is the last release for Python 3.11.
# The stamp is a file with hashes of the requirements: a second call installs nothing, and a changed
# requirement installs again.
define SETUP
import glob, hashlib, os, subprocess, sys
venv, requirements = "$(VENV)", "$(REQUIREMENTS)"
name = "oldest" if sys.version_info < (3, 12) else "newest"
if name == "newest" and "gpu" in requirements:
    name = "newest-gpu"
constraints = f"constraints/{name}.txt"
files = sorted({*glob.glob("requirements/*.txt"), "requirements.txt", requirements, constraints})
key = sys.version.split()[0] + " " + " ".join(
    hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files)
stamp, python = f"{venv}/.installed", f"{venv}/bin/python"
def run(*command):
    print("+", *command, flush=True)
    if subprocess.call(command):
        sys.exit(f"The set-up stopped: the command above failed; {venv} is incomplete.")
if os.path.exists(stamp) and os.path.exists(python) and open(stamp).read() == key:
    print(f"{venv} has {requirements} with {constraints} already; nothing to install.")
    sys.exit()
if os.path.isdir(venv) and os.listdir(venv) and not os.path.exists(f"{venv}/pyvenv.cfg"):
    sys.exit(f"{venv} exists and is not a virtual environment; name another folder with VENV=.")
print(f"Setting up {venv}: Python {sys.version.split()[0]}, {requirements} with {constraints} "
      "(a minute or two).", flush=True)
run(sys.executable, "-m", "venv", "--clear", venv)
# Python compiles what it imports; to compile every file takes half of the installation.
run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile",
    "-r", requirements, "-c", constraints)
# Here Python stores what it compiles, even if PYTHONDONTWRITEBYTECODE is set, as in many containers.
# Otherwise each start compiles jax and the rest again: 6 s instead of 2.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
subprocess.call([python, "-c", "import yocou_jax.training.loop, yocou_jax.training.console"])
open(stamp, "w").write(key)
print(f"{venv} is ready.")
endef
export SETUP

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "This project needs Python 3.11 or newer, but '$(PYTHON)' is older or missing: name another one, as in 'make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12'." >&2; exit 2; }
	@$(PYTHON) -c "$$SETUP"

train: setup
	$(VENV)/bin/python -m experiments.train --config=$(CONFIG) $(ARGS)

# One process per core. Each runs whole files, because the tests of a file share what they compile.
# tests/conftest.py sorts the files. Without it, xdist begins with those that have the most tests.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) $(ARGS)

test-fast: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-once: setup
	$(PYTEST) --once $(ARGS)

lint: setup
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
	  -r requirements/lint.txt
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m basedpyright --pythonpath $(VENV)/bin/python

notebooks: setup
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
	  -r requirements/notebooks.txt
	$(VENV)/bin/python -m notebooks.build $(ARGS)

# It has its own environment, because `setup` makes one again if other requirements are asked for.
kernels: REQUIREMENTS = requirements-aot.txt
kernels: VENV = .venv-aot
kernels: setup
	$(VENV)/bin/python -m experiments.compile_kernels --target=$(TARGET) $(ARGS)
