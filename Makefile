# Every target creates and fills .venv by itself; PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint format lab bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info[:2] <= (3,13) else "flashmoe_lab needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# From random weights in the published layout to text: packed to 4 bits, then streamed from disk.
demo: $(STAMP)
	rm -rf out/demo
	mkdir -p out
	$(BIN)/flashmoe-lab synth data/tiny.json out/demo/published --bits none
	$(BIN)/flashmoe-lab pack out/demo/published out/demo/packed --bits 4
	$(BIN)/flashmoe-lab inspect out/demo/packed
	@echo; echo "The weights are random, so the text is noise; what runs is the whole engine:"; echo
	$(BIN)/flashmoe-lab generate out/demo/packed --prompt "Once upon a time" --max-tokens 48 \
		--bank-gb 0.008 --temperature 1 --top-k 40 --seed 1

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=90

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: $(STAMP)
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .coverage
