# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv itself when needed.
# `make test-all` is the whole suite; it needs a browser, which `make browser` installs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SEED ?= 0
# A new folder each time: nothing is overwritten.
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

# Of `make study`; the same folder again goes on with the study in it.
STUDY := runs/study

# The final probes: necessity and sufficiency, each with its control, and every subset of the families.
PROBE := --kinds '[mask_renormalise,matched_mass,keep_only,keep_random]' --coalitions '[all]' --positions '[all]' --sublayers '[self_attn,mlp]' --num_sequences 64
# Of regions: single layers are in the last probe of training. Cumulative sources are taken out in the increment basis, too.
REGIONS := --scopes '[early,middle,late,all]'
INCREMENT := --kinds '[mask_renormalise,matched_mass,keep_only,keep_random,increment]'
FINAL := --scopes '[early,middle,late,all,final]'

# The model's tests, and some of probing and training, with the oldest transformers that is supported. Not those of
# streams: datasets needs a newer huggingface_hub than the oldest transformers does.
OLDEST := .venv/oldest
OLDEST_RELEASES := transformers==5.4.0 huggingface_hub==1.5.0 tokenizers==0.22.2
OLDEST_TESTS := $(filter-out %/test_stream.py,$(wildcard tests/attnres/test_*.py)) \
	tests/probe/test_cli.py tests/probe/test_text_cli.py tests/train/recall/test_module.py

# Two processes of one thread each: the tests are too small for more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Other people's programs that our models work with: peft, lm-evaluation-harness, nnsight, accelerate.
CLIENTS := .venv/.clients

.PHONY: demo study test test-all test-faults test-fuzz test-clients test-oldest browser lint format clean

demo: $(INSTALLED)
	$(BIN)/attnres-train fit --config configs/demo.yaml --seed_everything $(SEED) --run_dir $(RUN)/cumulative
	$(BIN)/attnres-train fit --config configs/block_sum.yaml --seed_everything $(SEED) --run_dir $(RUN)/block_sum
	$(BIN)/attnres-train fit --config configs/demo_vanilla.yaml --seed_everything $(SEED) --run_dir $(RUN)/vanilla
	$(BIN)/attnres-probe run $(RUN)/cumulative --output $(RUN)/cumulative/probe/final $(PROBE) $(REGIONS) $(INCREMENT)
	$(BIN)/attnres-probe run $(RUN)/block_sum --output $(RUN)/block_sum/probe/final $(PROBE) $(FINAL)
	$(BIN)/attnres-probe baseline $(RUN)/vanilla --num_blocks 4 --output $(RUN)/wrapped $(PROBE) $(REGIONS)
	$(BIN)/attnres-probe report $(RUN)/cumulative $(RUN)/block_sum $(RUN)/wrapped

study: $(INSTALLED)
	$(BIN)/attnres-train study --config configs/study.yaml --dir $(STUDY)

# What a newcomer runs: no slow tests, and without a browser the tests that need one are skipped.
test: $(INSTALLED)
	$(PYTEST) --ignore tests/integration -m 'not slow'

# Everything; a skipped test is a failure. The clients come last, so that all else is tested without them installed.
test-all: $(INSTALLED)
	ATTNRES_ALL=1 $(PYTEST) --ignore tests/integration
	$(MAKE) test-clients

# The long run: over 500 faults of every kind in every command, half an hour. As root, some on file systems of their own.
test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --output benchmarks/results/faults.json

# The long run: over 100,000 hostile inputs, half an hour.
test-fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz --output benchmarks/results/fuzz.json

test-clients: $(CLIENTS)
	ATTNRES_ALL=1 $(PYTEST) tests/integration

test-oldest: $(OLDEST)
	ATTNRES_ALL=1 PYTHONPATH=$(OLDEST) $(PYTEST) $(OLDEST_TESTS)

# For the tests of the report page. They also take a chromium on PATH, or the one that ATTNRES_CHROMIUM names.
browser: $(INSTALLED)
	$(BIN)/playwright install chromium

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mlinter --no-cache --no-progress attnres

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST): $(INSTALLED) Makefile
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ $(OLDEST_RELEASES)

$(CLIENTS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,integration]'
	touch $@
