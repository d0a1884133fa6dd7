# Two commands on a fresh machine: `make demo` runs the main job, `make test` runs the tests.
# Each sets up a virtual environment in .venv first. Nothing outside this folder is touched, but by `make browser`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-portable lint browser clean help

help:
	@echo "make demo   the main job on bundled data and model: about 4 minutes on 2 CPU cores"
	@echo "make test   the test suite"
	@echo "make test-portable  the tests that compute, as on another CPU: 2 minutes"
	@echo "make browser  installs Debian's Chromium, in which the tests of the page run; they skip without one"
	@echo "make lint   ruff and mypy"
	@echo "make clean  removes .venv and demo-run"

$(VENV)/.installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/bertforge demo

# The tests run on one thread each. A file stays in one process, for its fixtures take longer than most of its tests.
PROCESSES := -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed-dev $(VENV)/triton
	@command -v chromium >/dev/null || echo "note: no chromium, so the tests of the page are skipped; make browser"
	$(BIN)/python -m pytest $(PROCESSES)

# The page is tested in a real browser, and the document's commands by curl.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
browser:
	$(AS_ROOT) apt-get update -qq
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium curl

# A Triton server, and the NumPy of its Python. Where there is none for this machine, the test of it is skipped.
$(VENV)/triton: $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps --target $@ \
	  nvidia-pytriton==0.7.0 "numpy==1.26.4; python_version < '3.13'"

# Other kernels than this CPU's best, and four threads whatever its cores: results round and interleave otherwise.
test-portable: $(VENV)/.installed-dev
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=4 MKL_NUM_THREADS=4 $(BIN)/python -m pytest \
	  tests/kernels tests/lora tests/model tests/parity tests/training -k "not (triton or distributed or estimate or finetune)"

lint: $(VENV)/.installed-dev $(VENV)/stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/stubs $(BIN)/mypy

# Types of TensorRT's API. As published they do not parse: a parameter is named `in`, and one lacks its default.
$(VENV)/stubs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ tensorrt-stubs==10.13.0.35.1
	sed -i.published -e 's/ in: list/ in_: list/' -e 's/channel_axis: int)/channel_axis: int = 0)/' \
	  $@/tensorrt_bindings/tensorrt.pyi || { rm -rf $@; exit 1; }

clean:
	rm -rf $(VENV) demo-run
