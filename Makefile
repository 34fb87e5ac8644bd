# Every target works in .venv, which it makes and fills itself: `demo` with the core, the others with the tools on top.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench clean

demo: $(VENV)/.core
	$(BIN)/halfrank demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev
	for script in packing interop compat losses bad_input parity seed_script optimizer_only fault_injection diagnose_reported watch_cost kill certify doctor_predicts lora startup update_speed growth train_speed predict_speed tradeoff table plot; do \
		$(BIN)/python benchmarks/$$script.py $(QUICK) || failed="$$failed $$script"; \
	done; [ -z "$$failed" ] || { echo "below the bar:$$failed"; exit 1; }

# torch comes first and pinned: a range would take the newest build with gigabytes of CUDA.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo,fast]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
