# Everything a person or CI does with a checkout. Each target makes .venv when it is absent; a second call is quick.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet
WORKERS ?= 2
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test long planted check format bench recipes clean

demo: .venv/.installed-demo  ## pull a small model, tune it for at most three minutes, show what changed
	$(BIN)/tunesmith models pull smollm2-135m
	$(BIN)/tunesmith train recipes/demo.yaml --out $(RUN)

test: .venv/.installed-dev  ## every test but the `long` ones, so every pair of the support table; ARGS="tests/cli -x" runs a part
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20 $(ARGS)

long: .venv/.installed-dev  ## what `make test` leaves out: the other cells of the support table, and tests of minutes; ARGS="tests/matrix" runs a part
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long $(ARGS)

planted: .venv/.installed-dev  ## plant faults in a copy of the source, one by one, and show which test catches each
	$(BIN)/python -m tests.planted.run $(ARGS)

check: .venv/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed-dev  ## speed and memory against the peers; needs a quiet machine
	$(BIN)/python benchmarks/sft.py $(ARGS)

recipes: .venv/.installed-demo  ## every recipe as it stands, three steps each; ARGS="sft-lora --steps 10" runs a part
	$(BIN)/tunesmith models pull smollm2-135m
	$(BIN)/python recipes/run_all.py $(ARGS)

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and alone, so that the wheel which pip finds on this machine (CPU or CUDA) is the one that stays.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tunesmith needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	touch $@

.venv/.installed-demo: .venv/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[gguf]'
	touch $@

.venv/.installed-dev: .venv/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[gguf,dev]'
	touch $@ .venv/.installed-demo
