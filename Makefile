# make run      the embedded study, end to end (PROFILE=ci|default|sst|…; goes on where it stopped)
# make test     what CI runs
# make book     the notebooks, these pages and the reference as a site: build/book/index.html
# make lab      the notebooks in JupyterLab
# make bench    timings of the training step
# make attack   kills, full disks, bad inputs over a small run and a small sweep; hours (ARGS="--kills 5" for a try)
# make install  .venv with this package; make clean removes runs and caches
PYTHON ?= python3
PROFILE ?= default
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: run install test book lab bench attack clean

run: install
	$(BIN)/python -m carma_lib run --profile $(PROFILE) $(if $(findstring --fresh,$(ARGS)),,--resume) $(ARGS)

install: $(BIN)/.installed

# torch comes first, in one tried version: the newest one from the index may bring gigabytes of CUDA.
$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

book: $(BIN)/.installed-book
	$(BIN)/python -m sphinx --quiet --builder html --conf-dir book . build/book $(ARGS)
	@echo build/book/index.html

$(BIN)/.installed-book: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[book]"
	touch $@

lab: install
	$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/01_data_construction.ipynb $(ARGS)

bench: install
	$(BIN)/python benchmarks/step.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/long.py)

attack: install
	$(BIN)/python benchmarks/attack.py $(ARGS)

clean:
	rm -rf runs build dist .pytest_cache
	find carma_lib tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
