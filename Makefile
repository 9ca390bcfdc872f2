# make demo      set up .venv and run the demo: text in, speech file out, compiled and compared with eager
# make test      the test suite on stack A (qwen-tts, transformers 4.57)
# make test-hf5  the test suite on stack B (qwen-tts-hf, transformers 5)
# make test-ptx  the tests of attention's kernels on what Triton compiles for a GPU, run on the CPU
# make lint      ruff and pyright
# make bench     measure everything on this machine's GPU, draw it: build/bench/suite.json and pictures beside it
# make readme    write the tables of README.md and bench/README.md from bench/results
# make clean     remove what the others made

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)
BENCH_ARGS ?=
RESULTS = build/bench

.PHONY: demo test test-hf5 test-ptx lint bench readme clean

demo: .venv/.installed
	.venv/bin/qtts demo

# A file's tests run in one process (loadfile): what they compile or build once is not built again in another.
test: .venv/.installed
	.venv/bin/python -m pytest --timeout 900 --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-hf5: .venv-hf5/.installed
	.venv-hf5/bin/python -m pytest --timeout 900 --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Not those that trip an assert of compiled code on purpose, nor of programs of several warps, which multiply by wgmma, nor of kernels that stand in
# for others, nor of what a driver is asked.
ATTENTION = test_decode_attention.py test_qk_norm_rope_attention.py test_heads_attention.py test_norm_qkv_attention.py \
	turboquant/test_qk_norm_rope_quantized_attention.py turboquant/test_coded_heads_attention.py turboquant/test_norm_qkv_quantized_attention.py
test-ptx: .venv/.installed
	.venv/bin/python -m pytest -p tests.ptx.plugin --numprocesses $(JOBS) $(ATTENTION:%=tests/kernels/%) -k "not out_of_range and not launch3 and not stand_in and not room" $(PYTEST_ARGS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

bench: .venv/.installed
	@mkdir -p $(RESULTS)
	.venv/bin/qtts bench --json $(RESULTS)/suite.json --profile $(RESULTS)/kernels $(BENCH_ARGS) || failed=1; \
	if test -f $(RESULTS)/suite.json; then .venv/bin/python -m bench.plots $(RESULTS)/suite.json; fi; exit $${failed:-0}

readme: .venv/.installed
	.venv/bin/python -m bench.readme

.venv/.installed: EXTRAS = tts,test
.venv-hf5/.installed: EXTRAS = tts-hf,test
.venv/.installed .venv-hf5/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.10 or later, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old: install Python 3.10 or later, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-compile --editable '.[$(EXTRAS)]'
	touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-hf5 build dist *.egg-info .pytest_cache .ruff_cache demo.wav
