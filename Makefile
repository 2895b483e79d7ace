# Every target sets up what it needs; the second time that is a check of one file's date.
#   make demo PYTHON=python3.13   picks the interpreter the environment is made with.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.tinygpt-installed
export NO_MKDOCS_2_WARNING := 1
# torch's threads on Linux wait for each other by spinning. On a machine that does something else as well the default made
# the demo up to ten times slower; this costs nothing on an idle one.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs bench bench-gpu format

help:  ## list the targets
	@echo "make demo     train a small GPT on real text, stop, resume, write text, save, load: minutes on a CPU"
	@echo "make test     run the test suite"
	@echo "make check    formatting, lint, types, import floors, version"
	@echo "make docs     build the documentation into site/, warnings are errors"
	@echo "make bench    run the CPU set of benchmarks/, 16 minutes on two quiet cores"
	@echo "make bench-gpu  run the tests and benchmarks that need a CUDA device, about 20 minutes on an H200"
	@echo "make format   format the code and apply safe lint fixes"
	@echo "Each makes .venv and installs into it first, where that is needed. PYTHON=... chooses the interpreter."

install: $(STAMP)

# The stamp is written last, so an interrupted install is taken up again. A .venv whose pip does not run is remade.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tinygpt needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing tinygpt and its tools into $(VENV) (once; torch is a large download)"
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	@touch $@

demo: $(STAMP)
	$(PY) examples/reproduce_rtx4070_d12.py --scale demo --out runs/demo

test: $(STAMP)
	$(PY) -m pytest -n 2

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy src examples benchmarks
	$(VENV)/bin/lint-imports
	@code=$$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' src/tinygpt/__init__.py); \
	log=$$(sed -n 's/^## \([0-9][^ ]*\).*/\1/p' CHANGELOG.md | head -n 1); \
	test -n "$$code" && test "$$code" = "$$log" || \
	  { echo "version '$$code' in src/tinygpt/__init__.py is not the top entry '$$log' of CHANGELOG.md" >&2; exit 1; }; \
	echo "version $$code is the top entry of CHANGELOG.md"

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

# Sizes that a CPU finishes in minutes; the pages say which were run longer. What one script cannot do here (a peer that
# is not installed) it leaves out and says so.
bench: $(STAMP)
	@set -e; run() { echo "== benchmarks/$$*"; script=$$1; shift; $(PY) benchmarks/$$script "$$@"; }; \
	run training_step.py --rounds 5; run loss.py; run attention.py --rounds 3; run optimizer_step.py --rounds 3; \
	run memory.py --rounds 1; run decode.py --batches 1 8 --new 32 --rounds 2 --steps 150; run checkpoint.py --rounds 2; \
	run packing.py; run loader.py; run corpus_size.py --rounds 1; run compile.py --rounds 3; run import_time.py

bench-gpu: $(STAMP)
	$(PY) benchmarks/_gpu_set.py

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
