# make demo    set up, then the whole method on the built-in phantom, with a report under runs/demo
# make test    set up, then linters and tests, in two processes or JOBS=...
# make lint    set up, then ruff and mypy
# make sanitize set up, then tests of the C++ under AddressSanitizer and UndefinedBehaviorSanitizer
# make setup   only set up: a virtual environment in .venv, or in VENV=...; PYTHON=python3.12 picks the interpreter
# make weights train the networks that are bundled for the demo again (about 35 minutes)
# make clean   remove what was built, not what was installed or produced

VENV := .venv
PYTHON :=
# Processes that run tests. Most tests keep one core busy, whatever the machine has.
JOBS := 2
EXTRAS := train,test,dicom,deploy

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find csrc -type f)

.PHONY: setup demo test lint sanitize weights clean

setup: $(INSTALLED)

$(VENV)/bin/pip:
	@.ci/venv $(VENV) $(PYTHON)

# Without build isolation the extension is compiled by the pinned tools and against the torch that it is for, which
# therefore is there first.
# Setuptools' general advice on editable installs is left out.
# cldf_fast/__init__.py holds the version.
$(INSTALLED): Makefile pyproject.toml setup.py constraints.txt cldf_fast/__init__.py $(NATIVE) | $(VENV)/bin/pip
	@echo "Setting up $(VENV): the first time this downloads PyTorch, up to 3 GB, and takes some minutes."
	@$(PIP) install -c constraints.txt setuptools ninja pybind11 torch numpy
	@PYTHONWARNINGS=ignore $(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	@$(VENV)/bin/cldf-fast demo

test: lint
	@$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

sanitize: setup
	@.ci/sanitize $(VENV)/bin/python $(JOBS)

weights: setup
	@$(VENV)/bin/cldf-fast train cdm --config benchmarks/configs/phantom.yaml --out runs/phantom-weights
	@$(VENV)/bin/cldf-fast train classifier --config benchmarks/configs/phantom.yaml --out runs/phantom-weights
	@$(VENV)/bin/python benchmarks/bundle_weights.py runs/phantom-weights cldf_fast/weights/phantom

clean:
	@rm -rf build dist *.egg-info cldf_fast/_C.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find cldf_fast kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f $(INSTALLED)
