PYTHON ?= python3
BIN := .venv/bin
OUT ?= gpu-out

.PHONY: test lint train study cost bench bench-stochastic bench-train track compile-report gpu docs
.PHONY: test-libraries test-rectools test-replay test-recbole

# The tests, without a GPU in Triton's interpreter; then those of time, one after the other. To the former glibc keeps memory once had:
# to give it back and get it again, page by page, took a fifth of their time. The latter have it as a user's process would.
test: .venv/ready
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python -m pytest -q -n 2 -m "not timing"
	$(BIN)/python -m pytest -q -m timing tests/kernels/test_cost.py

# The adapters, each against the real library; all three agree on one environment.
test-libraries: test-rectools test-replay test-recbole

test-rectools test-replay test-recbole: test-%: .venv-libraries/ready
	.venv-libraries/bin/python -m pytest -q tests/integrations/test_$*.py

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/mypy

# A plain and a refined recommender on made-up histories, and what each reaches.
train: .venv/ready
	$(BIN)/awrsr train

# Does refinement help, when, and why: every run of the study that benchmarks/results/ lacks, then its tables and pictures. Hours; what
# is done is kept. BUDGET: minutes. DATA: folder with beauty.txt, lastfm.txt, wikipedia.txt, otherwise they are fetched.
study: .venv/ready
	$(BIN)/python benchmarks/study.py $(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--folder $(DATA)) --jobs $(or $(JOBS),1)
	$(BIN)/python benchmarks/study_report.py

# What refinement costs beside every rival, each kernel under the roof of its device, quality against training time: from committed
# results, in seconds.
cost: .venv/ready
	$(BIN)/python benchmarks/cost_report.py

# The CPU paths side by side; on a machine with a GPU, everything.
bench: .venv/ready
	$(BIN)/python benchmarks/attn_bench.py --out bench-out

# The same between Gaussians, every refinement beside STOSA's formulation. DATA: a file of histories, measured padded and packed.
bench-stochastic: .venv/ready
	$(BIN)/python benchmarks/attn_bench.py --backbone stochastic --refinement all --budget 3 --out bench-out/stochastic
	$(if $(DATA),$(BIN)/python benchmarks/attn_bench.py --backbone stochastic --refinement all --lengths $(DATA) \
	  --budget 3 --out bench-out/stochastic-histories)

# Training and evaluation of the recommender, layouts and refinements side by side. DATA: a file of histories, otherwise synthetic ones.
bench-train: .venv/ready
	$(BIN)/python benchmarks/train_bench.py $(if $(DATA),--data $(DATA)) --threads 1 --out bench-out/train

# What every kernel compiles to on every target, without a GPU: registers, spills, shared memory. An hour the first time.
compile-report: .venv/ready
	$(BIN)/python -m awrsr_kernels.compile_report --target all --json compile-report.json

# Times of a few calls, stored in .benchmarks/ and shown beside the run before: one run per commit.
track: .venv/ready
	$(BIN)/python -m pytest -q tests/kernels/test_track.py --benchmark-only --benchmark-autosave --benchmark-compare \
	  --benchmark-group-by=name --benchmark-columns=min,median,iqr,rounds

# GPU tests, checks, tuner, benchmarks and profile in under ten minutes, with the torch and Triton that $(PYTHON) has; nothing is installed.
gpu:
	$(PYTHON) benchmarks/gpu_run.py --out $(OUT)

# The pages under docs/, with a reference from the docstrings: docs/_build/index.html.
docs: .venv/ready
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[model,onnx,tensorboard,transformers,docs,dev]'
	touch $@

.venv-libraries/ready: setup.py constraints-libraries.txt
	$(PYTHON) -m venv .venv-libraries
	.venv-libraries/bin/python -m pip install -q -c constraints-libraries.txt -e '.[rectools,replay,recbole]' pytest pytest-timeout \
	  hypothesis
	touch $@
