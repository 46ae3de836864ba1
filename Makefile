# The README's two commands are `make demo` and `make test`. Both make .venv first, with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without a GPU the Triton kernels run in Triton's interpreter.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
INTERPRET := $(if $(GPU),0,1)

# CUDA kernels for A100, H100 and B200, and PTX for what is newer: half of what a release is built for, in half the time.
export KDKERNELS_CUDA_ARCHS ?= 80;90a;100

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Besides the installed Triton, the oldest that is still current: tests run what it compiles as well. Of more versions: make ptx TRITONS="3.6.0 3.9.0".
TRITONS ?= 3.6.0
OLDER_TRITONS := $(TRITONS:%=$(VENV)/triton-%)

# The folder for `make wheels`.
DIST ?= dist

.PHONY: demo test test-integrations real ptx lint docs wheels hub-kernel bench results gpu-kit sanitize sanitize-gpu compute-sanitizer clean

demo: $(VENV)/.built
	$(BIN)/kdkernels demo

test: $(VENV)/.built $(OLDER_TRITONS)
	TRITON_INTERPRET=$(INTERPRET) $(BIN)/python -m pytest -n 2 --dist worksteal

# The same, slower, and which lines no test runs.
coverage: $(VENV)/.built $(OLDER_TRITONS)
	TRITON_INTERPRET=$(INTERPRET) $(BIN)/python -m pytest -n 2 --dist worksteal --cov=kdkernels --cov-report=term-missing:skip-covered

# Patches for other trainers against the real packages, one environment each: INTEGRATIONS="trl" for one of them. Minutes, and a download each.
# Python 3.11 or newer; the output is committed, in tests/integrations/results.
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
INTEGRATIONS ?= $(basename $(notdir $(wildcard tests/integrations/requirements/*.txt)))
ENVIRONMENTS := .venv-integrations

test-integrations: $(INTEGRATIONS:%=test-integration-%)

test-integration-%: $(ENVIRONMENTS)/%/.installed
	$(ENVIRONMENTS)/$*/bin/python -m tests.integrations.report $*

.PRECIOUS: $(ENVIRONMENTS)/%/.installed
# Pinned packages, without what they ask for: torch and everything else that is not named comes from .venv, by a .pth file.
# LLaMA-Factory imports torchaudio, whose compiled part is linked to CUDA; torchaudio does without it where there is no such file.
$(ENVIRONMENTS)/%/.installed: tests/integrations/requirements/%.txt $(VENV)/.built
	$(PYTHON) -m venv $(ENVIRONMENTS)/$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" > "$$($(ENVIRONMENTS)/$*/bin/python -c '$(PURELIB)')/venv.pth"
	$(ENVIRONMENTS)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	rm -f $(ENVIRONMENTS)/$*/lib/python*/site-packages/torchaudio/lib/_torchaudio.so
	touch $@

# Every command with SmolLM2-135M, llama.cpp's server and `transformers serve`: ten minutes of two cores, after a download of 120 MB.
real: $(VENV)/.built $(VENV)/smollm2
	KDKERNELS_REAL_MODEL=$(abspath $(VENV)/smollm2) $(BIN)/python -m pytest -m real -s tests/real

$(VENV)/smollm2: | $(VENV)/.installed
	$(PIP) gguf xllamacpp
	$(BIN)/python tests/real/model.py $@

# Every case of tests/ptx for each version of Triton: an hour of one core.
ptx: $(VENV)/.installed $(OLDER_TRITONS)
	cd tests && ../$(BIN)/python -m ptx.report $(TRITONS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.report --check

# The documentation site, into site/, in ten seconds. To read it: python3 -m http.server --directory site
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist, and wheels for each Python 3.10 to 3.14 of this machine, each tried in a fresh environment: docs/release.md.
wheels: $(VENV)/.installed
	env -u KDKERNELS_CUDA_ARCHS $(BIN)/python release/wheels.py --out $(DIST)

# The losses in Python and Triton as a kernel for Hugging Face's package kernels: docs/release.md.
hub-kernel:
	$(PYTHON) release/hub_kernel.py --out $(DIST)/hub-kernel

# Has anything become slower against its own floor? Small shapes, minutes.
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks

# The figures of README.md and docs/: measures them on this machine, then redraws.
results: $(VENV)/.built
	$(BIN)/kdkernels bench --suite standard --out benchmarks/results/$$($(BIN)/python -m kdkernels.bench.environment)
	$(BIN)/python -m benchmarks.report

# What a GPU machine without a network lacks for benchmarks/run_gpu.sh, into gpu-kit/: about fifteen minutes on two cores.
# GPU_PYTHON: a Python of the version that the GPU machine has, with its headers.
GPU_PYTHON ?= python3.12
gpu-kit: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_kit build gpu-kit --python $(GPU_PYTHON)

# The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and fuzzed (tests/sanitize): two minutes.
sanitize: $(VENV)/.built
	$(MAKE) --jobs=2 --output-sync=target --directory=tests/sanitize PYTHON=$(abspath $(BIN)/python)

# Every tensor an allocation of its own, so that compute-sanitizer sees where it ends.
sanitize-gpu: compute-sanitizer $(VENV)/.built
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu

compute-sanitizer:
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize-gpu needs compute-sanitizer on PATH; it comes with the CUDA toolkit" >&2; exit 1; }
	@$(if $(GPU),true,echo "make sanitize-gpu needs a GPU, and nvidia-smi lists none" >&2; exit 1)

clean:
	rm -rf $(VENV) $(ENVIRONMENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable ".[train,bench,test,docs]"
	touch $@

$(VENV)/triton-%: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ "triton==$*; platform_system == 'Linux' and platform_machine == 'x86_64'"
	mkdir -p $@

# Compiles what changed since; the folders are named too, for sources that were removed.
$(VENV)/.built: $(VENV)/.installed setup.py $(shell find csrc)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
