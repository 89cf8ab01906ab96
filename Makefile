# The two commands of this project: `make demo` and `make test`. Nothing else to set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_PROMPTS := stories encyclopaedia instructions reasoning
MODEL ?= demo
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-gpu soak fresh lint check format docs cli-reference errors pictures install clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[dev,eval]"
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/actsparse run --model $(MODEL) \
	  $(foreach theme,$(DEMO_PROMPTS),--prompts sample_prompts/$(theme).jsonl) $(DEMO_OPTIONS)

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# On a machine with a CUDA device and its compiler; elsewhere the Triton kernels run in Triton's interpreter.
test-gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest tests/gpu tests/engine/cuda

# What takes longer than a test may: kills at drawn moments, many fuzzed inputs, and hours in one process with flat memory.
SOAK_KILLS ?= 50
SOAK_MINUTES ?= 60
FUZZ_EXAMPLES ?= 5000
soak: install
	SOAK_KILLS=$(SOAK_KILLS) $(BIN)/python -m pytest -rA --timeout 0 tests/hard/test_kills.py
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest --timeout 0 tests/hard/test_fuzz_parsers.py tests/hard/test_fuzz_runs.py
	SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python -m pytest -rA --timeout 0 tests/hard/test_long_run.py

# An empty environment, wheel and sdist, no network, a read-only HOME; prints the seconds of every step.
fresh:
	PYTHON=$(PYTHON) packaging/fresh_machine.sh

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference of the command line, from its own help, and the pictures of a report (they need chromium).
docs: install cli-reference errors pictures

# Every error message with its way out, from the source.
errors: install
	$(BIN)/python packaging/error_page.py

cli-reference: install
	( printf '# Command line\n\nMade by `make docs` from the commands themselves. Exit codes: 0 done; 1 failure, with a hint;'; \
	  printf ' 2 a command line that cannot be parsed; 3 a missed quality gate; 130 interrupted, finished work kept.\n'; \
	  for command in '' profile threshold evaluate report run methods models doctor; do \
	    printf '\n## actsparse%s\n\n```text\n' "$${command:+ $$command}"; \
	    COLUMNS=110 NO_COLOR=1 TERM=dumb $(BIN)/actsparse $$command --help | sed 's/ *$$//' | cat -s; \
	    printf '```\n'; \
	  done ) > docs/cli.md

DOCS := build/docs
DOCS_PROMPTS := $(foreach theme,$(DEMO_PROMPTS),--prompts sample_prompts/$(theme).jsonl)
pictures: install
	$(BIN)/actsparse run --model demo $(DOCS_PROMPTS) --output $(DOCS)/runs --report $(DOCS)/demo.html --quiet
	$(BIN)/actsparse profile --model demo $(DOCS_PROMPTS) --probes uncertainty,inertia,union --decode 16 --output $(DOCS)/probes --quiet
	$(BIN)/actsparse evaluate --model demo $(DOCS_PROMPTS) --study pitfalls --only P1,P5 --counterpart demo:relu --quick --output $(DOCS)/study --quiet
	$(BIN)/actsparse report $(DOCS)/runs/*/plan-* $(DOCS)/runs/*/eval-* $(DOCS)/probes $(DOCS)/study --output $(DOCS)/report.html --force
	$(BIN)/python tests/report/screenshots.py $(DOCS)/report.html docs/images

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
