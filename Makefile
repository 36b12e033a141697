# Everything installs what it needs into .venv; `make test` is the whole check, `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help install lint types test quickstart check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(INSTALLED)  ## make .venv and install everything into it

# torch comes first and by its exact version: the plain name takes a multi-gigabyte CUDA build.
$(INSTALLED): setup.py requirements-faces.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e '.[train,faces,dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements-faces.txt
	touch $(INSTALLED)

lint: $(INSTALLED)  ## style: ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The type checker does not know setup.py's folder map, so it is shown the same tree through links.
types: $(INSTALLED)  ## types: mypy
	rm -rf build/types && mkdir -p build/types/gptface_dist
	ln -s $(CURDIR)/gptface_dist/* build/types/gptface_dist/
	ln -s $(CURDIR)/kernels build/types/gptface_dist/kernels
	ln -s $(CURDIR)/launch build/types/gptface_dist/launch
	ln -s $(CURDIR)/tools build/types/gptface_dist/tools
	MYPYPATH=build/types $(BIN)/mypy -p gptface_dist

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/pytest -n 2 --dist loadfile

# Faces to render, how many to hold out of the image tokenizer's training, its steps, and where it all goes.
COUNT ?= 4000
HELD_OUT ?= 256
STEPS ?= 1000
OUT ?= out

quickstart: $(INSTALLED)  ## from nothing to batches of tokens: render, train tokenizers, tokenize, look; resumes where it stopped
	$(BIN)/gptface faces render $(OUT)/faces --count $(COUNT) --size 64 --seed 0
	$(BIN)/gptface faces sheet $(OUT)/faces $(OUT)/faces.png
	test -f $(OUT)/tokenizers/text.model || $(BIN)/gptface tokenizer text $(OUT)/faces $(OUT)/tokenizers/text.model --size 384
	$(BIN)/gptface tokenizer image $(OUT)/faces $(OUT)/tokenizers/image --preset tiny --size 64 --steps $(STEPS) --held-out $(HELD_OUT) --precision bf16
	$(BIN)/gptface tokenizer join $(OUT)/tokenizers
	$(BIN)/gptface data tokenize $(OUT)/faces $(OUT)/tokens --tokenizers $(OUT)/tokenizers --size 64 --workers 2
	$(BIN)/gptface data verify $(OUT)/tokens --tokenizers $(OUT)/tokenizers
	$(BIN)/gptface data batch configs/tiny.yaml data.tokenizers=$(OUT)/tokenizers "data.sources=[{path: $(OUT)/tokens}]"

check: lint types test  ## lint, types and tests

clean:  ## remove what was built
	rm -rf $(VENV) build out *.egg-info
