#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most eight minutes on one card: the tests that need one, then the benchmark.
#
#   loadtest/benchmarks/gpu.sh [FOLDER]
#
# Run it in the environment of the service (extra `gpu`, and `dev` for the tests). The table is written to FOLDER/gpu.md
# (by default ./gpu.md), the tests' output to FOLDER/gpu-tests.txt. Exits with the status of the tests, if these fail.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath "${1:-.}")
export PYTHONPATH="$PWD/service:$PWD/models:$PWD${PYTHONPATH:+:$PYTHONPATH}"

timeout 120 python -m pytest -q -m gpu tests/runtime tests/passes 2>&1 | tee "$folder/gpu-tests.txt"
tests=$?
timeout 350 python -m loadtest.benchmarks.gpu --device cuda:0 --out "$folder/gpu.md"
benchmark=$?
[ "$tests" -ne 0 ] && exit "$tests"
exit "$benchmark"
