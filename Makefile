# `make run` does the whole work, `make test` checks it, `make help` lists the rest.
# Everything goes into .venv, once per change of pyproject.toml or constraints.txt.

PYTHONS ?= python3.13 python3.12 python3.11 python3
ARGS ?=

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
EXTRAS := lab,world,released,test
PIP := $(PYTHON) -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU := --extra-index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)+cpu
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || echo 2)
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NBVAL_RUNS := $(CURDIR)/papermill_runs/.nbval
NOTEBOOKS := $(wildcard notebooks/[0-9]*.ipynb)

VERSION_FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VENV_WORKS := import ensurepip, venv

# Leaves the first Python that fits in $python, or says in one sentence what is missing.
define FIND_PYTHON
found=; missing=; \
for python in $(PYTHONS); do \
	"$$python" -c '$(VERSION_FITS)' >/dev/null 2>&1 || continue; \
	"$$python" -c '$(VENV_WORKS)' >/dev/null 2>&1 && { found=$$python; break; }; \
	missing=$$python; \
done; \
if [ -z "$$found$$missing" ]; then \
	echo "No Python from 3.11 to 3.13 found (tried $(PYTHONS)): install one, or name it with PYTHONS=/path/to/python" >&2; \
	exit 1; \
fi; \
if [ -z "$$found" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	{ apt-get update && apt-get install -y python3-venv; } >/dev/null 2>&1; \
	"$$missing" -c '$(VENV_WORKS)' >/dev/null 2>&1 && found=$$missing; \
fi; \
if [ -z "$$found" ]; then \
	echo "$$missing cannot make a venv: install that part first (Debian: apt-get install python3-venv)" >&2; exit 1; \
fi; \
python=$$found
endef

# A checkout that was moved is set up again: the editable install points at the old place.
$(shell [ "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" ] || rm -f $(READY))

.PHONY: run test lab clean help check-python browser
.DEFAULT_GOAL := help

run: export OMP_NUM_THREADS ?= $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))
run: $(READY)  ## the whole work: notebooks 00 to 07 on the tiny preset; ARGS="--name x -p seed 1" goes to the command
	@$(PYTHON) -m lingbot_nb run $(ARGS)

# The tests and the notebooks side by side, a core each: one after the other would take nearly twice as long.
NBVAL := $(PYTHON) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
	--nbval-sanitize-with tests/nbval_sanitize.cfg

test: export OMP_NUM_THREADS ?= 1
test: $(READY) browser  ## ruff, pytest, and the committed notebooks against their outputs
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	@rm -rf "$(NBVAL_RUNS)" && mkdir -p "$(NBVAL_RUNS)"
	@$(if $(NOTEBOOKS),LINGBOT_RUNS="$(NBVAL_RUNS)" $(NBVAL) $(NOTEBOOKS),true) > "$(NBVAL_RUNS)/nbval.log" 2>&1 & \
	notebooks=$$!; trap 'kill $$notebooks' INT TERM; \
	$(PYTHON) -m pytest tests; failed=$$?; \
	wait $$notebooks || failed=1; \
	cat "$(NBVAL_RUNS)/nbval.log"; exit $$failed

lab: $(READY)  ## JupyterLab on the notebooks
	$(PYTHON) -m jupyterlab $(ALLOW_ROOT) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks $(ARGS)

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) "$(NBVAL_RUNS)" .pytest_cache .ruff_cache .hypothesis lingbot_nb.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(VERSION_FITS)' >/dev/null 2>&1 || { \
		$(FIND_PYTHON); \
		"$$python" -m venv --clear $(VENV) || exit 1; \
	}
	@# Without an NVIDIA GPU the CPU build: as it lies at hand, else from PyTorch's own index, else whatever PyPI has.
	@if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
		echo "installing torch $(TORCH)"; $(PIP) torch==$(TORCH); \
	else \
		echo "installing torch $(TORCH), CPU build"; \
		$(PIP) --timeout 15 --retries 1 torch==$(TORCH)+cpu 2>/dev/null \
		|| $(PIP) --timeout 15 --retries 1 $(TORCH_CPU) 2>/dev/null \
		|| { echo "PyTorch's index of CPU builds cannot be reached: taking PyPI's torch $(TORCH)"; $(PIP) torch==$(TORCH); }; \
	fi
	@echo "installing the other packages"
	@$(PIP) --editable '.[$(EXTRAS)]'
	@echo "$(CURDIR)" > $@

check-python:
	@$(FIND_PYTHON); echo "$$python"

browser:
	@if command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "installing Debian's chromium for the browser tests"; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } >$(VENV)/apt.log 2>&1 \
		|| echo "chromium could not be installed (see $(VENV)/apt.log): the browser tests are skipped"; \
	else \
		echo "no chromium here: the browser tests are skipped (Debian: apt-get install chromium)"; \
	fi
