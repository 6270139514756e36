# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv itself when needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SEED ?= 0
# A new folder each time: nothing is overwritten.
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

# The final probes: the masks, the control of equal mass, every subset of the families, and the linear estimate.
PROBE := --kinds mask_renormalise matched_mass --coalitions all --first-order

.PHONY: demo test lint format clean

demo: $(INSTALLED)
	$(BIN)/attnres-train fit --config configs/demo.yaml --seed_everything $(SEED) --run_dir $(RUN)/trained
	$(BIN)/attnres-train fit --config configs/demo_vanilla.yaml --seed_everything $(SEED) --run_dir $(RUN)/vanilla
	$(BIN)/attnres-probe run $(RUN)/trained --output $(RUN)/trained/probe/final $(PROBE)
	$(BIN)/attnres-probe baseline $(RUN)/vanilla --num-blocks 4 --output $(RUN)/wrapped $(PROBE)
	$(BIN)/attnres-probe report $(RUN)/trained $(RUN)/wrapped

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
