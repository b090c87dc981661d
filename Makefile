# Every target creates and fills .venv by itself; PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint format lab bench clean

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info[:2] <= (3,13) else "flashmoe_lab needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	@echo "setting up $(VENV) and compiling the kernels: some minutes, the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# A story and a tool call, streamed from disk with the bundled model at 4 bits, and pictures of how they were made. A copy
# without the bundled weights makes a tiny model of random ones instead: the text is noise then, the rest is the same.
demo: $(STAMP)
	@rm -rf out/demo && mkdir -p out/demo
	@if [ ! -e data/demo_model/model.safetensors.index.json ]; then \
		echo "no bundled weights here: a tiny model with random weights stands in, its text is noise"; \
		$(BIN)/flashmoe-lab synth data/tiny.json out/demo/published --bits none --quiet && \
		$(BIN)/flashmoe-lab pack out/demo/published out/demo/packed --bits 4 --quiet; \
	fi
	@$(BIN)/flashmoe-lab inspect $(DEMO)
	@echo; echo "A story, with its experts read from disk as the router names them:"; echo
	@$(BIN)/flashmoe-lab trace $(DEMO) $(call ASK,Tell me a story about a fox named Fina.) \
		--max-tokens $(if $(WEIGHTS),320,64) --bank-gb 0.006 --out out/demo/story
	@echo; echo "A tool call:"; echo
	@$(BIN)/flashmoe-lab generate $(DEMO) $(call ASK,What is the weather in Oslo? Use celsius.) \
		$(if $(WEIGHTS),--tools data/prompts/tools.json) --max-tokens $(if $(WEIGHTS),64,16) --bank-gb 0.006
	@$(BIN)/flashmoe-lab plot out/demo/story --out out/demo --format png \
		--figure expert_histogram --figure io_timeline --figure layer_latency
	@echo; echo "Pictures are in out/demo. make lab opens the notebooks."

WEIGHTS := $(wildcard data/demo_model/model.safetensors.index.json)
DEMO    := $(if $(WEIGHTS),demo,out/demo/packed)
ASK      = $(if $(WEIGHTS),--chat,--prompt) "$(1)"

test: lint
	$(BIN)/python -m pytest -rs --cov --cov-report=term --cov-fail-under=90

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# OPTIONS go to JupyterLab: OPTIONS=--no-browser, in a container as root OPTIONS=--allow-root.
lab: $(STAMP)
	$(BIN)/flashmoe-lab lab $(MODEL) $(if $(OPTIONS),-- $(OPTIONS))

# Short versions of the benchmarks that benchmarks/README.md names for it, in some minutes.
RESULTS := benchmarks/results/latest.jsonl
bench: $(STAMP)
	rm -f $(RESULTS)
	$(BIN)/python benchmarks/kernels.py --gigabytes 0.5 --repetitions 3 --json $(RESULTS)
	$(BIN)/python benchmarks/storage.py --gb 1 --threads 2 8 --split 1 --repetitions 3 --json $(RESULTS)
	$(BIN)/python benchmarks/decode.py --json $(RESULTS)
	$(BIN)/python benchmarks/overlap.py --bank-gb 0.001 --json $(RESULTS)
	$(if $(WEIGHTS),$(BIN)/python benchmarks/hits.py --json $(RESULTS))
	$(BIN)/python benchmarks/prefill.py --json $(RESULTS)
	$(BIN)/python benchmarks/context.py --json $(RESULTS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .coverage
