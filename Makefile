# make demo   a real language model tuned end to end, from nothing
# make test   every check that CI runs
# Works with BSD make, GNU make 3.81 (macOS) and any POSIX shell.

PYTHON = python3
TORCH = torch==2.13.0
TORCH_INDEX = https://download.pytorch.org/whl/cpu
PY = .venv/bin/python
# Test processes; tiny models gain nothing from a second thread, so each has one. `make test WORKERS=0` runs in one process.
WORKERS = logical

.PHONY: all venv demo test lint types test-long oracle-adapters clean

all: venv

venv: .venv/.dev

demo: .venv/.package
	.venv/bin/deltatune train

lint: .venv/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) tools/budget.py

types: .venv/.dev
	$(PY) -m mypy

test: lint types
	$(PY) -m deltatune.methods --check
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not long" -n $(WORKERS) --dist worksteal

test-long: .venv/.dev
	$(PY) -m pytest -q -m long

# Our adapters against the `adapters` library, which wants an older transformers: an environment of its own.
oracle-adapters: .venv/.dev .venv-adapters/.ready
	OMP_NUM_THREADS=1 .venv-adapters/bin/python tests/oracles/adapters_make.py build/oracle-adapters
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) tests/oracles/adapters_compare.py build/oracle-adapters

.venv-adapters/.ready: .venv/.python
	$(PYTHON) -m venv .venv-adapters
	@if [ "`uname -s`" != Darwin ] && $(PYTHON) tools/python.py --reachable $(TORCH_INDEX)/torch/; then \
		.venv-adapters/bin/python -m pip install --index-url $(TORCH_INDEX) "$(TORCH)"; \
	fi
	.venv-adapters/bin/python -m pip install "$(TORCH)" adapters==1.3.0
	@touch $@

clean:
	rm -rf .venv .venv-adapters build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.python: tools/python.py
	@$(PYTHON) tools/python.py
	$(PYTHON) -m venv .venv
	@touch $@

# The CPU wheels are ten times smaller than the default ones on Linux; macOS wheels are CPU wheels anyway.
.venv/.torch: .venv/.python
	@if [ "`uname -s`" != Darwin ] && $(PY) tools/python.py --reachable $(TORCH_INDEX)/torch/; then \
		$(PY) -m pip install --index-url $(TORCH_INDEX) "$(TORCH)" || $(PY) -m pip install "$(TORCH)"; \
	else \
		$(PY) -m pip install "$(TORCH)"; \
	fi
	@touch $@

.venv/.package: .venv/.torch pyproject.toml
	$(PY) -m pip install -e .
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PY) -m pip install -e ".[dev]"
	@touch .venv/.package $@
