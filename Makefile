# The environment is .venv in this checkout. torch comes first, pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt


.PHONY: demo test test-all browser check lint bench docs clean

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

# Everything that must hold, in minutes. lint runs first; pytest's closing line comes last.
test: lint
	$(BIN)/deltaw fetch smollm2-135m-instruct
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not browser" --expect-skips 0

# The long runs and the peers too (under an hour).
test-all: lint $(VENV)/.ready-peers
	$(BIN)/deltaw fetch smollm2-135m-instruct
	$(BIN)/python -m pytest -q -m "not gpu and not browser" --expect-skips 0

# The lab in a real Chromium, which must be installed (apt-get install chromium); npm gives axe, which looks for barriers.
browser: $(VENV)/.ready-dev
	$(PIP) -e '.[browser]'
	mkdir -p build/axe && cd build/axe && npm pack --silent axe-core@4 > /dev/null && tar xzf axe-core-*.tgz
	$(BIN)/deltaw fetch smollm2-135m-instruct
	$(BIN)/python -m pytest -q -m browser --expect-skips 0

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

docs: $(VENV)/.ready
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist src/deltaw/ops/native/*.so
