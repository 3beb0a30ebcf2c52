# Two commands: `make train` quantizes the bundled teacher, `make test` runs the tests. Both make .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train test
train: .venv/ready
	$(BIN)/python train.py --wbits 4 --abits 3

test: .venv/ready
	$(BIN)/python -m pytest -q -rs

# A failed install leaves no `ready`, so the next call tries again.
.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@
