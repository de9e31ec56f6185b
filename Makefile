# Two commands on a fresh machine with Python 3.11 and pip: `make demo` and `make test`. Both set up .venv by themselves, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
AZURITE_VERSION := 3.35.0
READY := $(VENV)/.ready

.PHONY: demo test soak lint bench matrix clean

demo: $(READY)
	$(BIN)/spotguard rehearse --output rehearsal -- $(BIN)/python examples/digits/train.py

test: $(READY)
	$(BIN)/python -m pytest -n 5 --dist loadgroup

soak: $(READY)
	FAULTED_SAVES=2000 $(BIN)/python -m pytest --timeout 3600 tests/faults/test_s3_trouble.py -k over_a_faulty_network

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

matrix: $(READY)
	$(BIN)/python -m pytest -n 2 tests/equivalence/test_lightning.py --matrix docs/reference/lightning.md

bench: $(READY)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/s3.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --group dev
	@if command -v npm >/dev/null; then \
		npm install --silent --no-fund --no-audit --ignore-scripts --prefix $(VENV)/azurite azurite@$(AZURITE_VERSION) >/dev/null \
			|| echo "azurite could not be installed: its tests are skipped"; \
	fi
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache rehearsal runs
