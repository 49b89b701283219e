# make demo:   trains a short 10-shot sinusoid, evaluates it and draws what it learnt.
# make check:  lint, types and the tests that need no compilation, for every edit (under a minute).
# make test:   all tests but the slow ones (6 minutes); .ci/run says how the slow ones are run.
# make omniglot: fetches and prepares Omniglot, and evaluates the shipped 5-way 1-shot model on it.
# make study RUNS="FILE ..." VARY="NAME=VALUE,... ...": trains and evaluates files of flags times values of flags (docs/study.md).
# make table:  trains and evaluates every row of docs/results.md; takes days, can be stopped and started.
# make zoo:    evaluates the models in logs/ again and compares the figures with those recorded.
# All work on a fresh machine with Python 3.10 or newer: they make a virtual environment in .venv first.
# make demo CONSTRAINTS=constraints.txt installs the versions that were tested.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
DEMO = --datasource=sinusoid --logdir=logs/demo/ --metatrain_iterations=20000 --norm=None --update_batch_size=10

# Tests of one file run in one process: they share compiled models and runs.
TESTS ?= -m "not slow" tests

.PHONY: demo omniglot lint check test study table zoo clean

demo: $(VENV)/installed
	$(VENV)/bin/python main.py $(DEMO)
	$(VENV)/bin/python main.py $(DEMO) --train=False --test_set=True --plot

omniglot: $(VENV)/installed
	$(VENV)/bin/python data/omniglot_resized/resize_images.py --download
	$(VENV)/bin/python main.py --run=logs/omniglot5way --train=False --test_set=True

lint: $(VENV)/tested
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check: lint
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 -m quick tests

test: $(VENV)/tested
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

study: $(VENV)/installed
	$(VENV)/bin/python benchmarks/study.py $(RUNS) $(VARY:%=--vary %) $(FLAGS)

table: $(VENV)/installed
	$(VENV)/bin/python benchmarks/table.py

zoo: $(VENV)/installed
	$(VENV)/bin/python benchmarks/zoo.py check

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing TensorFlow and the other requirements; this takes a minute or two'
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

$(VENV)/tested: $(VENV)/installed tests/requirements.txt
	$(VENV)/bin/python -m pip install --quiet -r tests/requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

clean:
	rm -rf $(VENV) logs/demo
