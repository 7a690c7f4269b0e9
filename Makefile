# Two commands: `make demo` and `make test`. Each makes what is missing and repeats nothing.
# Options for llama.cpp go in CMAKE_ARGS, such as `make demo CMAKE_ARGS=-DGGML_CUDA=on`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DONE := $(VENV)/.done

PACKAGE_FILES := pyproject.toml CMakeLists.txt models/registry.json \
    $(shell find qaflora_edge patches -type f ! -path '*/__pycache__/*')

.PHONY: demo test lint clean FORCE

demo: $(DONE)/package
	$(BIN)/qaflora pull smollm2-135m-instruct
	$(BIN)/python models/demo.py

# `pytest`, not `python -m pytest`: the installed package is tested, not the checkout.
test: $(DONE)/package $(DONE)/test-tools
	$(BIN)/pytest

lint: $(DONE)/package $(DONE)/test-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The compiled llama.cpp stays in build/, the models in the user's cache.
clean:
	rm -rf $(VENV)

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "qaflora-edge needs Python 3.11 or newer; name one with 'make PYTHON=...'." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(DONE) && touch $@

# The pure-Python binding, from the archive that the patched source comes from as well. Without
# these options it would compile a second, unpatched llama.cpp.
$(DONE)/binding: $(DONE)/venv patches/UPSTREAM
	archive="$$($(BIN)/python patches/prepare.py --archive)" && \
	    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) install "$$archive"
	@touch $@

$(DONE)/package: $(DONE)/binding $(DONE)/cmake-args $(PACKAGE_FILES)
	$(PIP) install .
	@touch $@

# Plain `torch` is what pip's configuration makes it; the tests need only a CPU build.
$(DONE)/test-tools: pyproject.toml | $(DONE)/package
	$(PIP) install '.[test]'
	@touch $@

# Other build options are a reason to build again. The value comes by the environment, quoted.
export CMAKE_ARGS
$(DONE)/cmake-args: $(DONE)/venv FORCE
	@printf '%s\n' "$$CMAKE_ARGS" | cmp -s - $@ || printf '%s\n' "$$CMAKE_ARGS" > $@
