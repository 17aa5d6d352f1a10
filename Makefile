PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q
LIBRARIES := test-rectools test-replay test-recbole test-metrics

# glibc keeps memory that was freed: getting it back page by page took a fifth of the tests' time, and of the study's.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296

# Where `make test` leaves its reports, whose seconds `make guard` compares.
SUITE = .guard/suite/$(or $(shell git describe --always --dirty --abbrev=40 '--exclude=*'),unknown)

.DEFAULT_GOAL := help
.PHONY: help lint hooks test test-fast test-libraries $(LIBRARIES) guard train study study-core theory cost
.PHONY: torture bench bench-stochastic bench-train track compile-report gpu docs screenshots

help: ## print this list
	@awk -F ':.*## ' '/^## / { print "\n" substr($$0, 4) } /^[a-z-]+:.*## / { printf "  make %-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## Working on the code

lint: .venv/ready ## run ruff and mypy
	$(BIN)/ruff check . && $(BIN)/mypy

hooks: ## have git run ruff and mypy on staged files before each commit
	git config core.hooksPath .githooks

test: .venv/ready ## run all tests; those that measure time run last, with nothing else running
	$(KEEP_MEMORY) $(PYTEST) -n 2 --dist worksteal -m "not timing" --junitxml=$(SUITE)/tests.xml
	$(PYTEST) -m timing tests/kernels/test_cost.py --junitxml=$(SUITE)/timing.xml

test-fast: .venv/ready ## run a few tests of every test file, in two minutes
	$(KEEP_MEMORY) $(PYTEST) -n 2 --dist loadfile --fast

# The adapters, each against the real library. All three libraries agree on one environment.
test-libraries: $(LIBRARIES) ## test the adapters with RecTools, RePlay and RecBole, in .venv-libraries

$(LIBRARIES): test-%: .venv-libraries/ready
	.venv-libraries/bin/python -m pytest -q tests/integrations/test_$*.py

guard: .venv/ready ## compare quality, times, registers, tests and size with another commit (BASE=commit, DATA=folder)
	$(BIN)/python -m benchmarks.guard $(if $(BASE),--base $(BASE)) $(if $(DATA),--data $(DATA)) \
	  $(if $(PATIENCE),--patience $(PATIENCE))

torture: .venv/ready ## kill trainings, flip bits, race and fuzz; ends with status 1 if anything is lost in silence (MINUTES=5, at most 20)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture --minutes $(or $(MINUTES),5)

docs: .venv/ready ## build the pages under docs/, with a reference from the docstrings: docs/_build/index.html
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

screenshots: docs ## save pictures of every page, at two widths, in docs/_build/screenshots/; needs chromium (Debian: apt install chromium)
	$(BIN)/python docs/screenshots.py docs/_build

## Results

train: .venv/ready ## train a plain and a refined recommender on synthetic histories, and compare them
	$(BIN)/awrsr train

# Both run what benchmarks/results/ lacks. BUDGET: minutes. DATA: folder with jazz.txt and so on, otherwise fetched.
study-core: .venv/ready ## make the missing runs of the README's table; 4 hours of two cores, resumable (BUDGET=minutes, DATA=folder, JOBS=2)
	$(KEEP_MEMORY) $(BIN)/python benchmarks/study.py --only second-order $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(DATA),--folder $(DATA)) --jobs $(or $(JOBS),2)
	$(BIN)/python benchmarks/study_report.py --pages docs/study.md README.md

study: .venv/ready ## make all missing runs of the study, tables and pictures; hours, resumable (BUDGET=minutes, DATA=folder, JOBS=1)
	$(KEEP_MEMORY) $(BIN)/python benchmarks/study.py $(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--folder $(DATA)) --jobs $(or $(JOBS),1)
	$(BIN)/python benchmarks/study_report.py --pages docs/study.md README.md

theory: .venv/ready ## compute what one refined layer does by construction; minutes
	$(BIN)/python -m benchmarks.theory.construction
	$(BIN)/python -m benchmarks.theory.maps

cost: .venv/ready ## write the report on cost and its pictures, from committed results
	$(BIN)/python -m benchmarks.operator.cost_report

bench: .venv/ready ## compare the operator with its rivals, on the GPU if there is one, else on the CPU
	$(BIN)/python benchmarks/attn_bench.py --out bench-out

bench-stochastic: .venv/ready ## compare stochastic attention with STOSA's formulation (DATA=file of histories)
	$(BIN)/python benchmarks/attn_bench.py --backbone stochastic --refinement all --budget 3 --out bench-out/stochastic
	$(if $(DATA),$(BIN)/python benchmarks/attn_bench.py --backbone stochastic --refinement all --lengths $(DATA) \
	  --budget 3 --out bench-out/stochastic-histories)

bench-train: .venv/ready ## time training and evaluation of the recommender, by layout and refinement (DATA=file of histories)
	$(BIN)/python benchmarks/train_bench.py $(if $(DATA),--data $(DATA)) --threads 1 --out bench-out/train

track: .venv/ready ## time a few calls, store the times, and compare them with the previous run's
	$(PYTEST) tests/kernels/test_track.py --benchmark-only --benchmark-autosave --benchmark-compare \
	  --benchmark-group-by=name --benchmark-columns=min,median,iqr,rounds

compile-report: .venv/ready ## compile every kernel for every target and report on it; needs no GPU; an hour the first time
	$(BIN)/python -m awrsr_kernels.compile_report --target all --json compile-report.json

# With the torch and Triton that $(PYTHON) has; nothing is installed.
gpu: ## run GPU tests, benchmarks, profile and tuner, in under ten minutes (PYTHON=python3, OUT=gpu-out)
	$(PYTHON) benchmarks/gpu_run.py --out $(or $(OUT),gpu-out)

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[model,onnx,tensorboard,search,transformers,docs,dev]'
	touch $@

.venv-libraries/ready: setup.py constraints-libraries.txt
	$(PYTHON) -m venv .venv-libraries
	.venv-libraries/bin/python -m pip install -q -c constraints-libraries.txt -e '.[rectools,replay,recbole]' pytest pytest-timeout \
	  hypothesis
	touch $@
