# make quickstart   from nothing to a causal few-step generator that draws new kinds of sketches, on a CPU
# make test         the tests
# make test-all     the tests, then those that are marked slow
# make lint         ruff
# make mutants      which mistakes in the formulas no test would notice; MUTANTS='causal_wan.flow*' for one file
# make benchmark    tables of ratios against floors and peers, on this machine; about ten minutes
PYTHON := .venv/bin/python
SKETCH := outputs/sketch
# One process a core, 4 at most; together they see 8 clips a step.
PROCESSES ?= $(shell python3 -c "import os; n = os.cpu_count() or 1; print(4 if n >= 4 else 2 if n >= 2 else 1)")
ifeq ($(PROCESSES),1)
LAUNCH := .venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml
else
LAUNCH := .venv/bin/accelerate launch --config_file accelerate_configs/cpu_ddp.yaml --num_processes $(PROCESSES)
endif

.PHONY: quickstart test test-all lint mutants benchmark

quickstart: .venv/installed
	rm -rf $(SKETCH)
	$(PYTHON) examples/sketch/make_dataset.py --output_dir $(SKETCH)/data --kinds bird,umbrella
	$(PYTHON) generate.py --checkpoint examples/sketch/tiny-wan --num_frame_per_block 3 \
		--height 64 --width 112 --num_inference_steps 2 \
		--prompts_file $(SKETCH)/data/heldout.csv --output $(SKETCH)/before
	ACCELERATE_USE_CPU=true $(LAUNCH) train_video_regression.py --config examples/sketch/recipe.yaml \
		--train_batch_size $$((8 / $(PROCESSES)))
	$(PYTHON) generate.py --checkpoint $(SKETCH)/run \
		--prompts_file $(SKETCH)/data/heldout.csv --output $(SKETCH)/after
	$(PYTHON) examples/sketch/report.py --data_dir $(SKETCH)/data --before $(SKETCH)/before \
		--after $(SKETCH)/after --run $(SKETCH)/run --output_dir $(SKETCH)

# A file at a time, in the order of tests/conftest.py: the longest first.
PYTEST := HF_HUB_OFFLINE=1 $(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: .venv/installed-tests
	$(PYTEST)

test-all: test
	$(PYTEST) -m slow

RESULTS ?= benchmarks/results
benchmark: .venv/installed-tests
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/speed.py --output $(RESULTS)/speed_cpu_small.md \
		--parts attention modulation compilation checkpointing scaling context vae precision parts startup
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/speed.py --size mid --output $(RESULTS)/speed_cpu_mid.md --parts step sampling
	$(PYTHON) benchmarks/data.py
	$(PYTHON) benchmarks/memory.py

# Mistakes are made in a copy. What it prints last are those that all tests passed with.
MUTATED := outputs/mutants
mutants: .venv/installed-tests
	$(PYTHON) -m pip install --quiet "mutmut>=3.8"
	rm -rf $(MUTATED)
	mkdir -p $(MUTATED)
	cp -r causal_wan tests dataset_utils.py pyproject.toml $(MUTATED)
	cd $(MUTATED) && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(CURDIR)/$(PYTHON) -m mutmut run --max-children 2 $(MUTANTS)
	cd $(MUTATED) && for name in $$($(CURDIR)/$(PYTHON) -m mutmut results | grep -E "survived|no tests" | cut -d : -f 1); do \
		$(CURDIR)/$(PYTHON) -m mutmut show $$name; done

lint: .venv/installed-tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.venv/installed: requirements.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-tests: .venv/installed requirements-test.txt
	DS_BUILD_OPS=0 $(PYTHON) -m pip install --quiet --requirement requirements-test.txt
	touch $@
