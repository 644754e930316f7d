# Short names for the commands of README.md; each sets up .venv the first time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check docs

demo: $(READY)  ## the main job on all-MiniLM-L6-v2; the result is in demo/build/minilm
	$(BIN)/python examples/minilm.py demo
	$(BIN)/python -m pipeline build --precision int8 --recipe demo/pipeline.yaml -o demo/build/minilm

test: $(READY)
	$(BIN)/python -m pytest

check:  ## everything that CI runs, in an environment of its own
	.ci/run

docs: $(READY)  ## the generated pages
	$(BIN)/python -m pipeline.recipe_reference > docs/recipe.md
	$(BIN)/python -m pipeline.cli_reference > docs/cli.md

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -e '.[torch,text,images,triton,rtx,examples,dev]'
	touch $@
