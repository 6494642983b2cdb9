# Two commands matter: `make serve` and `make test`. Both set up .venv by themselves.
CONFIG ?= models/digits.yaml
PORT ?= 8000
HOST ?= 127.0.0.1
ONNXRUNTIME ?= cpu# or gpu
BIN := .venv/bin
# Installing compiles nothing, which halves its time: what is imported is compiled then, where the environment forbids it, too.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install serve test soak perf-analyzer prometheus browser lock zoo fuzz measure check build bench train-digits clean

install: .venv/.installed

# torch comes first and bounded: an unbounded one may pull another build with gigabytes of GPU libraries.
.venv/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile "torch>=2.11,<2.14"
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[$(ONNXRUNTIME),openvino,grpc,text,vision,audio,dev,loadtest]"
	touch $@

serve: install
	$(BIN)/leanserve serve --config $(CONFIG) --host $(HOST) --port $(PORT)

build: install
	$(BIN)/leanserve build --config $(CONFIG)

bench: install
	$(BIN)/leanserve build --config $(CONFIG)
	$(BIN)/leanserve bench --config $(CONFIG)

# What measures time, or floods sockets, has the machine to itself; all else runs side by side, the longest first, with a
# thread each for sums. Where services have more of them, those that wait do not do so busily: they would keep the cores
# from the threads that they wait for (a build took 141 s beside other tests, and so 49). Of the tests beside those that
# measure, some only wait, for a limit or for the end of a process. To rewrite all assertions, so that they tell their
# values, takes every process 12 s: only what failed is run again with that.
WAITING := serving/test_decoding.py $(addprefix robustness/test_,drain.py grpc_room.py hang_up.py hanging_batches.py \
	isolation_under_load.py leaving.py limits.py poison.py refusals.py shutdown.py upgrades.py)
ALONE := $(filter-out $(WAITING),$(patsubst tests/%,%,$(wildcard tests/serving/test_*.py tests/robustness/test_*.py))) \
	peers test_memory.py test_timing.py test_bench.py evaluation/test_lane_rates.py evaluation/test_interleaved_benchmark.py \
	$(addprefix runtime/test_,device.py isolation.py onnx_arena.py onnx_runtime.py spin_control.py turns.py)
QUICKLY := $(BIN)/pytest --assert=plain
TELL := || { $(BIN)/pytest --last-failed --last-failed-no-failures none; exit 1; }
test: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(QUICKLY) --numprocesses 3 --dist loadfile --no-loadscope-reorder tests $(ALONE:%=--ignore=tests/%) $(TELL)
	$(QUICKLY) $(ALONE:%=tests/%) $(TELL)

# What takes minutes: bombs and floods at their full size, shutdowns, builds beside other work.
# Prints figures as those in docs/measurements/.
soak: install
	$(BIN)/pytest -m soak -s --timeout 3600

# Optional, on Debian: with it three more tests are run instead of skipped.
perf-analyzer: install
	tests/tools/perf_analyzer.sh

# Optional, on Debian: the dashboards and rules are tested in a real Prometheus.
prometheus: install
	tests/tools/prometheus.sh

# Optional, on Debian, as root: the page at `/` is tested in a real browser.
browser: install
	command -v chromium || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; }

# The versions with which the tests passed; run it in an environment that was made without constraints.
lock: install
	$(BIN)/pip freeze --exclude-editable | grep -v -e '^torch==' -e '^torchvision==' -e '^nvidia-' -e '^pip==' >constraints.txt

# Hours: what precisions, engines and the passes that make a model smaller do to the shipped bases, as tables. It goes on
# where it was stopped.
MEASURED ?= .leanserve/measured
measure: install
	for what in precision families; do for step in build time table; do \
		$(BIN)/python -m loadtest.benchmarks.$$what $$step digits minilm efficientnet_lite0 --folder $(MEASURED)/$$what || exit 1; \
	done; done

# Real models, downloaded into LEANSERVE_ZOO (by default a folder in ~/.cache); what was tried is not tried again.
zoo: install
	PYTHONPATH=tests/support $(BIN)/python -m zoo

fuzz: install
	LEANSERVE_FUZZ_SECONDS=120 $(BIN)/pytest tests/fuzz --timeout 7200

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

train-digits: install
	$(BIN)/python -m leanserve_models.train_digits

clean:
	rm -rf .venv .leanserve
