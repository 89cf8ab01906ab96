# The two commands of this project: `make demo` and `make test`. Nothing else to set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_PROMPTS := stories encyclopaedia instructions reasoning

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint check format install clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/actsparse run --model demo \
	  $(foreach theme,$(DEMO_PROMPTS),--prompts sample_prompts/$(theme).jsonl) $(DEMO_OPTIONS)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
