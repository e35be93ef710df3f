PYTHON ?= python3
SOURCES = nkd_hf recipes tests benchmarks

.PHONY: help demo test test-oldest test-slow test-rows quality style

# `make` alone shows the list, too.
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "%-18s%s\n", $$1, $$2}'

demo: .venv/installed  ## install into .venv, then distil a DeiT on the digits
	.venv/bin/accelerate launch recipes/distill_deit.py

test: .venv/installed-test .venv/installed-space  ## run the tests, but for the long ones
	.venv/bin/python -m pytest --numprocesses auto --dist worksteal

test-oldest: .venv/oldest/installed  ## run the tests with the oldest versions that setup.cfg admits
	.venv/oldest/bin/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/installed-test  ## run the long tests: the three recipes in full, resuming, memory
	.venv/bin/python -m pytest -m slow

test-rows: .venv/installed-test  ## take one training step of each row of the paper's tables
	.venv/bin/python -m pytest -m rows -s

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
