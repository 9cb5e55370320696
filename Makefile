# `make quickstart` and `make test` start from a bare clone; both make the environment first.
# PYTHON=/path/to/python3.11 chooses the interpreter, SLOW=1 runs the slow tests too. pip finds
# its packages by its own settings: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, … are passed through.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help install quickstart test quick test-oldest lint docs clean

VENV := .venv
OLDEST := .venv-oldest
INSTALLED := $(VENV)/installed
PYTHON ?=
SLOW ?=
TRITON := 3.8.0
# ninja comes from the environment, and torch looks for it on the path.
ACTIVATE := export PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; unset PYTHONPATH PYTHONHOME

help:
	@echo 'make install     the environment alone, in $(VENV)'
	echo 'make quickstart  distil a student on docstrings: some minutes on a CPU'
	echo 'make test        the whole test suite (SLOW=1: the slow tests too)'
	echo 'make quick       its cheapest tests, under a minute of CPU: rooms, config, losses, rows'
	echo 'make test-oldest the tests of GPUs under torch 2.11 (5 GB)'
	echo 'make lint        format, ruff and pyright'
	echo 'make docs        the documentation site, in build/site'
	echo 'make clean       remove the environment and all caches; keeps runs/'

install: $(INSTALLED)

# The mark is removed first and written last: an environment without one is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@missing=0
	complain() { echo "missing: $$1" >&2; missing=1; }
	serves() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; }
	python=
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do
		if serves "$$candidate" 2>/dev/null; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ]; then
		complain 'python 3.11 to 3.13 (tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)); choose one with make PYTHON=…'
	else
		"$$python" -c 'import venv, ensurepip' 2>/dev/null ||
			complain "the venv module of $$python (Debian and Ubuntu: the package python3-venv)"
		"$$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
			complain "the headers of $$python, Python.h (Debian and Ubuntu: the package python3-dev)"
	fi
	command -v "$${CXX:-g++}" >/dev/null || complain "$${CXX:-g++}, the C++ compiler (Debian and Ubuntu: the package g++)"
	[ $$missing = 0 ] || exit 1
	if [ -e $@ ]; then rm $@; else "$$python" -m venv --clear $(VENV); fi
	$(ACTIVATE)
	python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,lora,onnx]'
	# CUDA builds of torch bring their own; elsewhere the kernels' tests need its interpreter.
	python -c 'import triton' 2>/dev/null ||
		python -m pip install --disable-pip-version-check --no-deps 'triton==$(TRITON)' ||
		echo 'triton $(TRITON) is not available: the tests of the Triton kernels will be skipped' >&2
	touch $@

quickstart: install
	@$(ACTIVATE)
	exec python launch/quickstart.py

test: install
	@$(ACTIVATE)
	# Two processes, each with ranks of its own: the files go to whoever is free.
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(if $(SLOW),,-m 'not slow')

quick: install
	@$(ACTIVATE)
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow' tests/test_layout.py \
		tests/config tests/losses tests/data/test_several_labels.py tests/data/test_chat_rows.py \
		tests/data/test_splits.py

# Before a release: the lowest torch that is supported, a CUDA build of 5 GB, with its Triton.
test-oldest: $(OLDEST)/installed
	@unset PYTHONPATH PYTHONHOME
	# Triton 3.6's interpreter uses what numpy 1.25 deprecated.
	$(OLDEST)/bin/python -m pytest -W ignore::DeprecationWarning $(if $(SLOW),,-m 'not slow') \
		tests/test_pretended_gpu.py kernels/tests/test_chunking.py kernels/tests/test_triton_*.py \
		tests/benchmarks/test_gpu_day.py

$(OLDEST)/installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),python3) -m venv --clear $(OLDEST)
	grep -vE '^(torch|triton|numpy|setuptools)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check \
		--constraint $(OLDEST)/constraints.txt 'torch==2.11.0' 'numpy<2.4' --editable '.[dev]'
	touch $@

lint: install
	@$(ACTIVATE)
	# CI only looks: whoever commits formats.
	ruff format --quiet $(if $(CI),--check,) .
	ruff check .
	pyright --warnings

docs: install
	@$(ACTIVATE)
	mkdocs build

clean:
	rm -rf .venv* .cache build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
