# Each target sets up $(VENV) first: pinned dependencies once per set of pins, then this checkout itself.
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=

# What the environment holds: the pins, and the dependencies that pyproject.toml names (not its tools' settings).
NEEDS  := import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
          print(p["project"]["dependencies"], p["project"]["optional-dependencies"], p["build-system"])
PINS   := $(shell (cat constraints.txt; $(PYTHON) -c '$(NEEDS)') | sha256sum | cut -c1-16)
HERE   := $(shell printf '%s' '$(CURDIR)' | sha256sum | cut -c1-16)
DEPS   := $(VENV)/.dependencies-$(PINS)
READY  := $(VENV)/.installed-$(PINS)-$(HERE)
RUN    := $(VENV)/bin/python
PIP    := --quiet --disable-pip-version-check

.PHONY: demo test check lint types serve mlflow cluster bench picture image-steps clean pins
.DEFAULT_GOAL := demo

demo: $(READY)
	$(RUN) -m jobs.demo digits $(ARGS)

# The tests that start clusters mostly wait: the others, and then those that ask a server, run beside them, unless ARGS
# says which to run.
test: $(READY) lint types
ifeq ($(strip $(ARGS)),)
	@( $(RUN) -m pytest -m "not cluster"; quick=$$?; $(RUN) -m pytest -m served && exit $$quick ) \
	    > $(VENV)/beside.log 2>&1 & beside=$$!; \
	$(RUN) -m pytest -m "cluster and not served"; slow=$$?; \
	wait $$beside; beside=$$?; cat $(VENV)/beside.log; test $$slow -eq 0 -a $$beside -eq 0
else
	$(RUN) -m pytest $(ARGS)
endif

check: test

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

serve: $(READY)
	@exec $(RUN) -m serve_apps $(ARGS)

mlflow: $(READY)
	@mkdir -p outputs/mlflow
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow server --host 127.0.0.1 --port 5000 \
	    --backend-store-uri sqlite:///$(CURDIR)/outputs/mlflow/mlflow.db $(ARGS)

# Three Ray nodes, S3 and MLflow on this machine; ARGS=down stops them.
cluster: $(READY)
	@$(RUN) -m jobs.cluster $(or $(strip $(ARGS)),up)

bench: $(READY)
	$(RUN) -m benchmarks.digits_seeds $(ARGS)

# The operator's page as the docs show it; needs chromium.
picture: $(READY)
	MEANET_PICTURE=docs/operator.png $(RUN) -m pytest tests/test_operator_page.py -k picture $(ARGS)

# The Dockerfile's steps where no Docker engine runs; as root, with debootstrap: docs/deployment.md.
image-steps: $(READY)
	$(RUN) container/steps.py $(ARGS)

pins:
	@echo $(PINS)

clean:
	rm -rf outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(DEPS):
	@echo "setting up $(VENV): about 6 GB once unpacked, some minutes"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(PIP) -c constraints.txt --upgrade pip setuptools
	$(VENV)/bin/python -m pip install $(PIP) -c constraints.txt -e '.[platform,dev]'
	$(VENV)/bin/python -m pip check
	@touch $@

$(READY): $(DEPS)
	@rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install $(PIP) --no-deps --no-build-isolation -e .
	@touch $@
