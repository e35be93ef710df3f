PYTHON ?= python3
SOURCES = nkd_hf recipes tests benchmarks

.PHONY: help demo test test-runs test-oldest test-slow test-rows test-gpu bench-gpu wheels quality style

# `make` alone shows the list, too.
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "%-18s%s\n", $$1, $$2}'

demo: .venv/installed  ## install into .venv, then distil a DeiT on the digits
	.venv/bin/accelerate launch recipes/distill_deit.py

test: .venv/installed-test  ## run the quick tests: 4 to 9 minutes on two cores
	.venv/bin/python -m pytest -m "not runs and not slow and not rows and not gpu" --numprocesses auto --dist worksteal

test-runs: .venv/installed-test .venv/installed-space  ## run the longer tests: whole recipes, kills, processes, the notebook, the Space
	.venv/bin/python -m pytest -m "runs and not slow and not rows and not gpu" --numprocesses auto --dist worksteal

test-oldest: .venv/oldest/installed  ## run test and test-runs with the oldest versions that setup.cfg admits
	.venv/oldest/bin/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/installed-test  ## run the long tests: the three recipes in full, resuming, memory
	.venv/bin/python -m pytest -m slow

test-rows: .venv/installed-test  ## take one training step of each row of the paper's tables
	.venv/bin/python -m pytest -m rows -s

# A machine with a GPU may have no network: `make test-gpu WHEELS=build/wheels` installs what `make wheels` has downloaded
# elsewhere beside the packages of PYTHON, and runs there. Without WHEELS both run in .venv.
ifdef WHEELS
GPU_INSTALLED = build/site-packages/installed
GPU_PYTHON = PYTHONPATH=$(CURDIR):$(CURDIR)/build/site-packages HF_HUB_OFFLINE=1 $(PYTHON)
else
GPU_INSTALLED = .venv/installed-test
GPU_PYTHON = .venv/bin/python
endif

test-gpu: $(GPU_INSTALLED)  ## run the tests that need a GPU: made for less than 3 minutes
	@$(GPU_PYTHON) benchmarks/gpu/check.py
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu --numprocesses 4 --dist worksteal --durations 5

bench-gpu: $(GPU_INSTALLED)  ## measure on a GPU, in less than 6 minutes, into benchmarks/results/*-gpu.json
	@$(GPU_PYTHON) benchmarks/gpu/check.py
	$(GPU_PYTHON) benchmarks/gpu/bench.py $(if $(PARTS),--only $(PARTS))

PLATFORMS = $(foreach version,_2_28 _2_27 _2_17 2014,--platform manylinux$(version)_x86_64)
wheels: .venv/installed-test  ## download into build/wheels what test-gpu and bench-gpu need on a machine without a network
	rm -rf build/wheels
	.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
	.venv/bin/python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
	    $(PLATFORMS) --dest build/wheels --requirement benchmarks/gpu/wheels.txt
	@du -sm build/wheels | awk '{ print $$1 " MB in " $$2; exit $$1 >= 60 }'

# dill pickles the modules of a folder of another name by their content, on which `datasets` fails.
build/site-packages/installed: benchmarks/gpu/wheels.txt $(wildcard $(WHEELS)/*.whl)
	rm -rf build/site-packages
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --find-links $(WHEELS) --target build/site-packages \
	    --requirement benchmarks/gpu/wheels.txt nkd_hf
	@touch $@

quality: .venv/installed-test  ## check the code with ruff
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)

style: .venv/installed-test  ## apply ruff's fixes and format
	.venv/bin/ruff check --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

# pip, not python: venv makes it last, so that a venv that was interrupted is made again.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

# The installation is editable: only a change of the metadata asks for a new one. pip stands behind the `|` because every
# installation touches it.
.venv/installed: setup.cfg pyproject.toml | .venv/bin/pip
	@echo "Installing nkd_hf and what it needs into .venv: some minutes, several GB"
	.venv/bin/python -m pip install --editable .
	@touch $@

.venv/installed-test: setup.cfg pyproject.toml | .venv/bin/pip
	@echo "Installing nkd_hf, what it needs and its test tools into .venv: some minutes, several GB"
	.venv/bin/python -m pip install --editable ".[test]"
	@touch .venv/installed $@

# gradio asks for an older pillow than the tests run with: recipes/space gets an environment of its own, which finds the rest
# in .venv.
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/installed-space: recipes/space/README.md recipes/space/requirements.txt | .venv/installed-test
	.venv/bin/python -m venv .venv/space
	.venv/bin/python $(PURELIB) > "$$(.venv/space/bin/python $(PURELIB))/outer.pth"
	.venv/space/bin/python -m pip install "gradio==$$(sed -n 's/^sdk_version: //p' recipes/space/README.md)" \
	    --requirement recipes/space/requirements.txt
	@touch $@

# The oldest versions that setup.cfg admits, with the newest test tools.
.venv/oldest/installed: setup.cfg pyproject.toml constraints/oldest.txt
	@echo "Installing the oldest versions that nkd_hf works with into .venv/oldest: some minutes, several GB"
	$(PYTHON) -m venv .venv/oldest
	.venv/oldest/bin/python -m pip install --constraint constraints/oldest.txt --editable ".[test]"
	@touch $@
