# Works from a clone in any folder, one with spaces in its name too, and after a move: every path is relative, and tools
# run as modules, because an installed script holds the absolute path of its interpreter.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --constraint requirements/constraints.txt
INSTALLED := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
OVERLAYS := $(VENV)/overlays
DIFFUSERS_TESTS := $(addprefix tests/patches/,test_codebases.py test_diffusers_private.py flux diffusers)

.DEFAULT_GOAL := help
.PHONY: help setup operators lint docs test test-lowest extras campaigns wheel demo bench gpu-prepare clean distclean

help: ## list the targets
	@echo "usage: make <target> [ARGS='...'] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## create .venv with pinned tools and this package, editable
	@$(RUN) -m jitaccel.build cpu --if-stale || echo "make: plain torch runs in place of the CPU operators" >&2

operators: setup ## compile csrc/ where that is not done, for CUDA too where there is an nvcc
	$(RUN) -m jitaccel.build --if-stale

lint: setup docs ## ruff, mypy, the site's links, and actionlint where it is installed
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	@if command -v actionlint >/dev/null; then actionlint; else echo "make: no actionlint, CI alone checks the workflows" >&2; fi

docs: setup ## the site, in build/site; fails on a link or a name that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# A process a core, of one thread each: threads of several processes on one core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile

test: lint operators $(OVERLAYS)/quantised ## lint, compile all operators, then pytest $(ARGS); without ARGS test-lowest, too
	PYTHONPATH=$(OVERLAYS)/quantised $(PYTEST) $(ARGS)
ifeq ($(ARGS),)
	@$(MAKE) --no-print-directory test-lowest
endif

test-lowest: $(OVERLAYS)/lowest ## the tests that touch diffusers, with the lowest version that is supported
	PYTHONPATH=$(OVERLAYS)/lowest $(PYTEST) $(DIFFUSERS_TESTS)

# Not `eval`, which holds packages back in an environment of its own, nor `flash-attn`, which is compiled.
extras: setup ## resolve each extra under requirements/constraints.txt; installs nothing
	for extra in app video serve cache-dit xformers; do \
		$(PIP) --quiet --dry-run --ignore-installed --no-build-isolation ".[$$extra]" || exit 1; \
	done

campaigns: operators ## an hour of random operations, faults and damage on two cores; python -m tests.campaigns $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m tests.campaigns $(ARGS)

# Packages that some tests alone see, before those of the environment.
$(OVERLAYS)/%: requirements/%.txt $(INSTALLED)
	rm -rf $@
	$(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target $@ --requirement $<
	@touch $@

wheel: setup ## sdist and wheel in dist/, checked, installed and run; python -m release.wheel $(ARGS)
	$(RUN) -m release.wheel $(ARGS)

demo: setup ## the embedded pipeline with and without acceleration; jitaccel demo $(ARGS)
	$(RUN) -m jitaccel demo $(ARGS)

bench: setup ## python -m benchmarks $(ARGS)
	$(RUN) -m benchmarks $(ARGS)

gpu-prepare: setup ## fill .gpu/ with what benchmarks/gpu.sh needs on a lent machine: operators for sm_90, wheels
	PYTHON=$(RUN) benchmarks/gpu_prepare.sh

clean: ## remove builds and caches
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and .venv, and the compiled operators
	rm -rf $(VENV) jitaccel/_C_*.so

# An environment that a set-up left unfinished is made anew: pip takes a half unpacked package for an installed one.
# setuptools and torch come first, because the package is built against what is installed (--no-build-isolation).
# A torch without CUDA has no use for CUDA operators: only `make operators` and `make test` compile them then.
$(INSTALLED): pyproject.toml setup.py requirements/constraints.txt
	@if [ -e $(UNFINISHED) ] || ! $(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		command -v "$(PYTHON)" >/dev/null || \
			{ echo "make: needs Python 3.11 or newer, found no $(PYTHON); try make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: needs Python 3.11 or newer, \
	got %s at %s; try make PYTHON=python3.11" % (sys.version.split()[0], sys.executable))' || exit 1; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(UNFINISHED) && "$(PYTHON)" -m venv $(VENV) || exit 1; \
	fi
	@touch $(UNFINISHED)
	$(PIP) setuptools torch
	cuda=$$($(RUN) -c 'import torch; print("auto" if torch.version.cuda else 0)') && \
		JITACCEL_CUDA=$${JITACCEL_CUDA:-$$cuda} $(PIP) --no-build-isolation --editable '.[dev,diffusers]'
	@rm $(UNFINISHED) && touch $(INSTALLED)
