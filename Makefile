# The environment is .venv in this checkout. torch comes first, pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two processes of one thread each, a file of tests at a time, in their own order: the long ones are not the last.
# A process that dies ends the run; a test that hangs for 20 minutes ends its process, and says where.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0 --timeout 1200 --expect-skips 0

.PHONY: demo test test-all starter chromium check lint bench pictures docs clean

NATIVE := hatch_build.py $(wildcard src/deltaw/ops/native/*.cpp src/deltaw/ops/native/*.h) src/deltaw/ops/native/build.py

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.ready-peers: $(VENV)/.ready-dev
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) -e '.[dev,peers]' # llama.cpp's own choice of instructions may not run here
	touch $@

# Environment, starter base, training on shipped data, evaluation before and after, merge, an answer.
demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

# Everything that must hold, in minutes. lint runs first, beside what the tests need; pytest's closing line comes last.
test: $(VENV)/.ready-dev
	$(MAKE) --no-print-directory -j 2 -O lint starter chromium
	$(PYTEST) -m "not slow and not gpu"

# The long runs and the peers too (under an hour).
test-all: lint starter chromium $(VENV)/.ready-peers
	$(PYTEST) -m "not gpu"

# The starter base, in the user's cache.
starter: $(VENV)/.ready-dev
	$(BIN)/deltaw fetch smollm2-135m-instruct

# A Chromium for the lab's tests: the one that is there, else playwright's own or the system's package.
chromium: $(VENV)/.ready-dev
	$(BIN)/python tests/lab/lab_chromium.py

# What can be said without running the library: format, lint, types, imports, house rules.
check: lint
	$(BIN)/python -m pytest -q tests/house

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	$(BIN)/python bench/bench_train.py

# The pictures of docs/lab.md, light and dark.
pictures: chromium
	$(BIN)/deltaw fetch smollm2-135m-instruct
	PYTHONPATH=tests $(BIN)/python tests/lab/lab_pictures.py

docs: $(VENV)/.ready
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist src/deltaw/ops/native/*.so
