# Everything a person runs in a clone. Needs GNU make and Python 3.11 or newer with venv.
#
#   make serve ARGS="--port 0"      make test ARGS="-k restart"

PYTHON ?= python3
UV     ?= uv
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check

# More workers than this only wait for each other.
TEST_WORKERS_MAX := 8

# Every platform and version that is supported, from the public index alone.
COMPILE := $(UV) pip compile pyproject.toml --quiet --no-config --upgrade \
	--universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

# Each client for itself: they do not agree on what they need.
COMPILE_CLIENT := $(subst pyproject.toml ,,$(COMPILE))

.DEFAULT_GOAL := help
.PHONY: help serve test check format live browser soak mcp clients bench lock clean

help: ## Say what there is to make.
	@sed -n 's/^\([a-z ]*\):.*## /  make \1\t/p' Makefile | expand -t 30

serve: $(VENV)/serve.stamp $(VENV)/compiled.stamp ## Install what is locked, then run the gateway.
	@$(BIN)/ownware serve $(ARGS)

test: $(VENV)/test.stamp ## Install what is locked, then run the tests.
	@$(BIN)/python -m pytest -n auto --maxprocesses $(TEST_WORKERS_MAX) $(ARGS)

check: $(VENV)/test.stamp ## Format, lint, types, layers.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/test.stamp ## Format, and repair what can be repaired.
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

live browser soak mcp clients: $(VENV)/test.stamp ## Run the tests that are left out otherwise.
	@$(BIN)/python -m pytest -m $@ $(ARGS)

bench: $(VENV)/test.stamp ## Measure how fast it is, beside what the machine can do.
	@$(BIN)/python -m tests.bench $(ARGS)

lock: ## Make the lock files anew (needs uv).
	$(COMPILE) --group build --output-file requirements.lock
	$(COMPILE) --group build --group test --group check --constraint requirements.lock \
		--output-file requirements-dev.lock
	for client in tests/clients/*.in; do \
		$(COMPILE_CLIENT) $$client --output-file $${client%.in}.lock || exit 1; \
	done

clean: ## Remove all that was installed or cached.
	rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# As pip does with what it installs. Python does it by itself, but not where it is told to write
# nothing (PYTHONDONTWRITEBYTECODE, as in many images): every start would then compile all anew.
$(VENV)/compiled.stamp: $(wildcard $(addprefix ownware_gateway/,*.py */*.py */*/*.py)) | $(BIN)/pip
	@$(BIN)/python -m compileall -q ownware_gateway
	@touch $@

# The project is installed in place: what runs is the code of the clone. A stamp is touched last, so
# that an installation that broke off is taken up again.
$(VENV)/serve.stamp: requirements.lock pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/test.stamp: requirements-dev.lock pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --require-hashes -r requirements-dev.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/serve.stamp
