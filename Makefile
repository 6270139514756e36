# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv itself when needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SEED ?= 0
# A new folder each time: nothing is overwritten.
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

# Of `make study`; the same folder again goes on with the study in it.
STUDY := runs/study

# The final probes: the masks, the control of equal mass, every subset of the families, and the linear estimate.
PROBE := --kinds '[mask_renormalise,matched_mass]' --coalitions '[all]' --mode both

# The model's tests, and one each of probing and training, with the oldest transformers that is supported.
OLDEST := .venv/oldest
OLDEST_RELEASES := transformers==5.4.0 huggingface_hub==1.5.0 tokenizers==0.22.2
OLDEST_TESTS := tests/attnres tests/probe/test_cli.py tests/probe/test_text_cli.py tests/train/recall/test_module.py

# Two processes of one thread each: tests are small, and most of their time one thread works.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Optional: what other people's programs make of our models.
CLIENTS := .venv/.clients

.PHONY: demo study test test-oldest test-integration lint format clean

demo: $(INSTALLED)
	$(BIN)/attnres-train fit --config configs/demo.yaml --seed_everything $(SEED) --run_dir $(RUN)/trained
	$(BIN)/attnres-train fit --config configs/demo_vanilla.yaml --seed_everything $(SEED) --run_dir $(RUN)/vanilla
	$(BIN)/attnres-probe run $(RUN)/trained --output $(RUN)/trained/probe/final $(PROBE)
	$(BIN)/attnres-probe baseline $(RUN)/vanilla --num_blocks 4 --output $(RUN)/wrapped $(PROBE)
	$(BIN)/attnres-probe report $(RUN)/trained $(RUN)/wrapped

study: $(INSTALLED)
	$(BIN)/attnres-train study --config configs/study.yaml --dir $(STUDY)

# The page is tested in a browser: Debian's chromium, or the one that ATTNRES_CHROMIUM names (ATTNRES_NO_BROWSER=1: not).
test: $(INSTALLED)
	$(PYTEST) --ignore tests/integration

test-oldest: $(OLDEST)
	PYTHONPATH=$(OLDEST) $(PYTEST) $(OLDEST_TESTS)

test-integration: $(CLIENTS)
	ATTNRES_INTEGRATION=1 $(BIN)/python -m pytest tests/integration

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
