# Two commands: `make train` quantizes the bundled teacher, `make test` runs the tests. Both make .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train test
train: .venv/ready
	$(BIN)/python train.py --wbits 4 --abits 3

test: .venv/ready     # two halves at once, a core each: they run in half the time
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -q -rfEs tests/test_[!7]*.py > .venv/first.txt 2>&1 & first=$$!; \
	$(BIN)/python -m pytest -q -rfEs tests/test_7*.py; second=$$?; \
	wait $$first; first=$$?; cat .venv/first.txt; exit $$((first + second))

# A failed install leaves no `ready`, so the next call tries again.
.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@
