# Every command of the project. `make demo` and `make test` do all their own set-up; Rust and Python must be there.
PYTHON ?= python3
VENV ?= .venv
DATA ?= watch
OUT ?= results/demo
LATER_SEEDS ?= 10
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

BIN := $(VENV)/bin
# The same torch path for every cargo command: torch-sys is compiled once, not once for lint and once for the install.
BUILD_ENV := $(BIN)/python build_backend/igm_build.py
BUILD_FILES := pyproject.toml build_backend/igm_build.py
SOURCES := $(BUILD_FILES) Cargo.toml Cargo.lock build.rs .cargo/config.toml $(wildcard src/*.* src/python/*)

.PHONY: install demo later test test-long contract test-install lint bench bench-networks bench-cuda wheel clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.build-tools: $(BUILD_FILES)
	$(PYTHON) -m venv $(VENV)
	$(BUILD_ENV) requirements > $(VENV)/build-requirements.txt
	$(BIN)/python -m pip install -r $(VENV)/build-requirements.txt
	touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/igm-rs table 1 --data $(DATA) --out $(OUT) $(DEMO_FLAGS)

later: install
	$(BIN)/python -m igm_rs.experiments.later --out results/later --seeds $(LATER_SEEDS)

test: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-long: install
	$(BIN)/python -m pytest tests/test_state_machine.py --hypothesis-profile=long
	$(BIN)/python -m pytest -m slow tests/test_faults.py

contract: install
	$(BIN)/python tests/contract_table.py --write

test-install: install
	$(BIN)/python -m pytest -m slow tests/test_package.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy build_backend
	$(BIN)/mypy benchmarks
	$(BIN)/stubtest --mypy-config-file pyproject.toml igm_rs._igm_rs
	cargo fmt --check
	$(BUILD_ENV) cargo clippy --release --all-targets -- -D warnings

bench: install
	$(BIN)/python -m benchmarks.run $(BENCH_FLAGS)

bench-networks: install
	$(BIN)/python -m benchmarks.networks $(BENCH_FLAGS)

bench-cuda: install
	$(BIN)/python -m benchmarks.run --device cuda $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.networks --device cuda $(BENCH_FLAGS)

wheel: $(VENV)/.build-tools
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf target dist $(VENV) python/igm_rs/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
