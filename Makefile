# Each command sets up its own environment in $(VENV) the first time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check docs tutorials

demo: $(VENV)/demo-ready  ## the main job on all-MiniLM-L6-v2; the result is in demo/build/minilm
	$(BIN)/python examples/minilm.py demo
	$(BIN)/python -m pipeline build --precision int8 --recipe demo/pipeline.yaml -o demo/build/minilm

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready  ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/*.Dockerfile; else echo "no hadolint here: docker/ was not checked"; fi

check:  ## everything that CI runs, in an environment of its own
	.ci/run

docs: $(VENV)/ready  ## the generated pages
	$(BIN)/python -m pipeline.recipe.reference > docs/recipe.md
	$(BIN)/python -m pipeline.cli_reference > docs/cli.md

tutorials: $(VENV)/ready  ## runs what the tutorials show, from the start, and writes the outputs into the pages (minutes)
	$(BIN)/pip install --quiet --no-deps rapidocr-onnxruntime==1.4.4
	$(BIN)/python docs/tutorials/regenerate.py

# torch alone and first: this version's wheel needs no CUDA packages, which a resolver might otherwise pick up with it.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	touch $@

$(VENV)/demo-ready: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet -e '.[torch,text,triton,examples]'
	touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet -e '.[torch,text,images,triton,rtx,ray,examples,dev]'
	touch $@
