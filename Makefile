# Everything installs what it needs into .venv; `make test` is the whole check, `make help` lists the rest.
# The first that starts: a name alone says little, where pyenv puts a stand-in for each version under it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13; do $$python -c "import venv" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# What the recipes call. Where the program is not installed (docs/gpu.md), name it, and nothing is installed:
# make gpu-study GPTFACE="python3 -m gptface_dist.tools.main"
ifeq ($(origin GPTFACE),undefined)
GPTFACE := $(BIN)/gptface
READY := $(INSTALLED)
endif

# What is tested and trained here is too small to be shared among threads: with one each, it is faster.
export OMP_NUM_THREADS ?= 1

.PHONY: help install lint types test check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(INSTALLED)  ## make .venv and install everything into it

# torch comes first and by its exact version: the plain name takes a multi-gigabyte CUDA build.
$(INSTALLED): setup.py requirements-faces.txt
	@test -n "$(PYTHON)" || { echo "no python3.11, python3.12 or python3.13 starts here: name one, make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && echo "$(VENV) is made with $$($(BIN)/python --version), $(PYTHON)"; }
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
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The oldest versions that are supported, in an environment of their own: 5 GB with CUDA's libraries, so no part of `make test`.
# The first that starts, as above; VERSIONS_PYTHON=/path/to/python3.13 tries another one.
VERSIONS_PYTHON ?= python3.12
VERSIONS_TORCH ?= 2.11.0
VERSIONS := build/versions
.PHONY: test-versions
test-versions:  ## kernels, model, a few layouts and the GPU check's dry run with torch 2.11.0, triton 3.6.0 and Python 3.12 (5 GB)
	test -x $(VERSIONS)/bin/python || $(VERSIONS_PYTHON) -m venv $(VERSIONS)
	$(VERSIONS)/bin/pip install -q --disable-pip-version-check torch==$(VERSIONS_TORCH)
	$(VERSIONS)/bin/pip install -q --disable-pip-version-check -e '.[train,faces,dev]'
	$(VERSIONS)/bin/python -c "import sys, torch, triton, numpy; print('Python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
	$(VERSIONS)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/kernels tests/model tests/benchmarks
	$(VERSIONS)/bin/gptface parity --dp 2 --zero 1
	$(VERSIONS)/bin/gptface parity --tp 2 --pp 2 --sp --zero 3
	$(VERSIONS)/bin/gptface bench gpu --dry --out build/versions-gpu

# The quickstart's sizes, configuration, layout and folder.
COUNT ?= 4000
HELD_OUT ?= 256
SIZE ?= 32
PRESET ?= tiny
CODES ?= 64
WORDS ?= 640
TOKENIZER_STEPS ?= 800
CONFIG ?= configs/quickstart.yaml
STEPS ?= 400
LAYOUT ?= layout.dp=2 layout.zero=3 layout.reshard_after_forward=false
# Further key=value of the training run.
TRAIN ?=
OUT ?= out
# Processes that render and tokenize, those that read pictures for the image tokenizer's training (0: itself), and where
# pictures become tokens.
WORKERS ?= 2
READERS ?= 0
DEVICE ?= cpu
CORES = $(shell getconf _NPROCESSORS_ONLN)
# Faces that fill the picture, with captions that name hair, expression and glasses first: a small model learns what is large
# in the picture and often told.
RENDER = --size $(SIZE) --closeness 1.7 --prominent 0.9
# The held-out face that is edited, and the box around its eyes, at 32 pixels.
FACE = 000000004
EYES ?= 7,8,27,17
DATA = data.tokenizers=$(OUT)/tokenizers "data.sources=[{path: $(OUT)/tokens}]"
HELD = "evaluation.sources=[{path: $(OUT)/held_out_tokens}]"

.PHONY: quickstart quickstart-gpu data model pictures
quickstart-gpu: COUNT = 100000
quickstart-gpu: HELD_OUT = 1024
quickstart-gpu: SIZE = 128
quickstart-gpu: EYES = 28,32,108,68
quickstart-gpu: PRESET = base
quickstart-gpu: CODES = 1024
quickstart-gpu: WORDS = 2048
quickstart-gpu: TOKENIZER_STEPS = 20000
quickstart-gpu: WORKERS = $(CORES)
quickstart-gpu: READERS = $(CORES)
quickstart-gpu: DEVICE = cuda
quickstart-gpu: CONFIG = configs/quickstart_gpu.yaml
quickstart-gpu: STEPS = 20000
quickstart-gpu: LAYOUT =
quickstart-gpu: OUT = out-gpu
quickstart-gpu: quickstart  ## the same at 128 px with 100 M parameters, on one GPU

quickstart: data model pictures  ## from nothing to generated faces and a report; resumes where it stopped
	$(GPTFACE) report $(OUT)/run $(OUT)/report.html --title "GPTFace quickstart" \
	  --section "Rendered faces=$(OUT)/faces.png" --section "Reconstructions=$(OUT)/tokenizers/image/sheet.png" \
	  --section "Generated faces=$(OUT)/generated.png" --section "Prompts, a row each, and p(match)=$(OUT)/generated.txt" \
	  --section "Edits: before, after each=$(OUT)/edits.png" --section "Edits=$(OUT)/edits.txt" \
	  --section "Captions of the face before=$(OUT)/captions.txt"

data: $(READY)  ## render faces, train both tokenizers, tokenize, verify
	$(GPTFACE) faces render $(OUT)/faces --count $(COUNT) $(RENDER) --seed 0 --workers $(WORKERS)
	$(GPTFACE) faces render $(OUT)/held_out --count $(HELD_OUT) $(RENDER) --seed 1 --workers $(WORKERS)
	$(GPTFACE) faces sheet $(OUT)/faces $(OUT)/faces.png
	test -f $(OUT)/tokenizers/text.model || $(GPTFACE) tokenizer text $(OUT)/faces $(OUT)/tokenizers/text.model --kind bpe --size $(WORDS)
	$(GPTFACE) tokenizer image $(OUT)/faces $(OUT)/tokenizers/image --preset $(PRESET) --size $(SIZE) --codes $(CODES) --steps $(TOKENIZER_STEPS) --held-out $(HELD_OUT) --precision auto --workers $(READERS)
	$(GPTFACE) tokenizer join $(OUT)/tokenizers
	$(GPTFACE) data tokenize $(OUT)/faces $(OUT)/tokens --tokenizers $(OUT)/tokenizers --size $(SIZE) --workers $(WORKERS) --device $(DEVICE)
	$(GPTFACE) data tokenize $(OUT)/held_out $(OUT)/held_out_tokens --tokenizers $(OUT)/tokenizers --size $(SIZE) --device $(DEVICE)
	$(GPTFACE) data verify $(OUT)/tokens --tokenizers $(OUT)/tokenizers

model: data  ## train the tiny model, convert it to a release
	$(GPTFACE) train $(CONFIG) $(DATA) $(HELD) run.folder=$(OUT)/run run.steps=$(STEPS) $(LAYOUT) $(TRAIN)
	test $(OUT)/release -nt $(OUT)/run/checkpoints/latest || { rm -rf $(OUT)/release $(OUT)/.release.*.tmp && $(GPTFACE) convert $(OUT)/run $(OUT)/release; }

# In the words of the captions: nine in ten tell an expression where one is seen, so that a text without one may mean a face mask.
PROMPTS = --text "a smiling woman with blond hair" --text "a man with black hair and a neutral expression, wearing glasses" \
  --text "an angry man with red hair" --text "a surprised woman with gray hair"

pictures: model  ## generate, edit and caption with the release
	$(GPTFACE) generate $(OUT)/release $(OUT)/generated.png $(PROMPTS) -n 4 guidance.classifier_free=3 guidance.rerank=4 > $(OUT)/generated.txt
	tar -xOf $(OUT)/held_out/00000.tar $(FACE).png > $(OUT)/face.png
	tar -xOf $(OUT)/held_out/00000.tar $(FACE).mask.png > $(OUT)/mask.png
	$(GPTFACE) edit $(OUT)/release $(OUT)/edited.png --image $(OUT)/face.png --parsing $(OUT)/mask.png --strip $(OUT)/edits.png \
	  --region $(EYES) --text "a surprised man with gray hair, wearing glasses" \
	  --region hair --text "a surprised man with red hair, wearing glasses" > $(OUT)/edits.txt
	$(GPTFACE) caption $(OUT)/release $(OUT)/face.png -n 3 > $(OUT)/captions.txt

# The study's figures are of the quickstart's model, trained for longer on more faces.
.PHONY: study
study:  ## train and measure: docs/study.md; two hours on two cores
	$(MAKE) quickstart COUNT=16000 CODES=128 TOKENIZER_STEPS=1500 CONFIG=configs/study.yaml STEPS=9000 LAYOUT= OUT=out-study
	$(GPTFACE) faces render out-study/judged --count 8600 $(RENDER) --seed 99
	$(GPTFACE) study out-study/release out-study/judged docs --judge-faces 8000 --held-out 600 --epochs 6 --prompts 140 --edits 100

# The same on a GPU within a quarter of an hour, all of it in one folder. A second call goes on where the first was cut.
.PHONY: gpu-study
JUDGED ?= 1650
STUDY ?= --judge-faces 1500 --held-out 150 --epochs 10 --prompts 20 --edits 6
gpu-study: COUNT = 12000
gpu-study: HELD_OUT = 256
gpu-study: SIZE = 128
gpu-study: EYES = 28,32,108,68
gpu-study: PRESET = small
gpu-study: CODES = 512
gpu-study: WORDS = 800
gpu-study: TOKENIZER_STEPS = 2000
gpu-study: WORKERS = $(CORES)
gpu-study: READERS = $(CORES)
gpu-study: DEVICE = cuda
gpu-study: CONFIG = configs/gpu_study.yaml
gpu-study: STEPS = 1000
gpu-study: LAYOUT =
gpu-study: OUT = out-gpu-study
gpu-study: quickstart  ## the learning run on one GPU, in a quarter of an hour: docs/gpu.md
	$(GPTFACE) faces render $(OUT)/judged --count $(JUDGED) $(RENDER) --seed 99 --workers $(WORKERS)
	test $(OUT)/study/study.png -nt $(OUT)/release || $(GPTFACE) study $(OUT)/release $(OUT)/judged $(OUT)/study $(STUDY)

.PHONY: gpu-bundle
gpu-bundle: data  ## one archive that carries all this to a GPU machine without internet: docs/gpu.md
	$(GPTFACE) bundle dist/gptface-gpu.tar.xz --data $(OUT)

check: lint types test  ## lint, types and tests

clean:  ## remove what was built
	rm -rf $(VENV) build dist out out-* *.egg-info
