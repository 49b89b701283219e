# make demo: trains a short 10-shot sinusoid, evaluates it and draws what it learnt. make test: runs the tests;
# make test TESTS= : the slow ones too.
# Both work on a fresh machine with Python 3.10 or newer: they make a virtual environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
DEMO = --datasource=sinusoid --logdir=logs/demo/ --metatrain_iterations=20000 --norm=None --update_batch_size=10

TESTS ?= -m "not slow"

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/python main.py $(DEMO)
	$(VENV)/bin/python main.py $(DEMO) --train=False --test_set=True --plot

test: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -r tests/requirements.txt
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 $(TESTS) tests

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing TensorFlow and what else is needed; this takes a minute or two'
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) logs/demo
