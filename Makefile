# Two commands matter: `make demo` and `make test`. Both work on a machine with nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Three at a time on two cores: hosts, worlds of ranks, and the rest; each waits for its processes now and then.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-slow checks clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# MPICH has a folder of its own: its mpiexec and Open MPI's would overwrite each other.
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps --prefix $(VENV)/mpich mpich || \
		echo 'no MPICH for this platform: its tests will skip'
	touch $@ $(VENV)/.demo

# From nothing to a model that writes Python, on this machine's CPU. Everything it makes is in demo/.
demo: $(VENV)/.demo
	$(BIN)/python -m data_tools corpus --source=python-stdlib --out=demo/corpus
	$(BIN)/python -m data_tools tokenizer --input='demo/corpus/*.jsonl' --vocab_size=4096 --out=demo/tokenizer
	$(BIN)/python -m data_tools tokenize --input='demo/corpus/*.jsonl' --tokenizer=demo/tokenizer.model --out=demo/python --workers=2
	$(BIN)/python -m data_tools inspect demo/python --samples=0
	$(BIN)/python -m launch run configs/demo.yaml --nproc=2
	@echo; echo 'A sample, at temperature 0.7:'; echo
	$(BIN)/python -m megatron_lite generate demo/runs/demo --prompt='def __init__(self' --temperature=0.7 --top_k=50
	@echo; echo 'Compare the validation loss above with the unigram entropy, the loss of a model that knows only frequencies.'
	@echo 'Curves:      $(BIN)/tensorboard --logdir demo/runs'
	@echo 'Checkpoint:  $(BIN)/python -m megatron_lite ckpt inspect demo/runs/demo'
	@echo 'Go on:       $(BIN)/python -m launch run configs/demo.yaml --nproc=2 --train.steps=1200'

test: $(VENV)/.dev
	$(PYTEST)

# Faults and recovery once more under the sharded engines.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

checks: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo runs build dist
