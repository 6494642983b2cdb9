#!/usr/bin/env bash
# Puts Triton's perf_analyzer into .venv/bin, for the tests that drive a server with it. A wheel of 2024 is the last that
# carries the binary; it wants libb64, which Debian has, and the CUDA runtime, with or without a GPU (Linux, x86-64).
set -euo pipefail
cd "$(dirname "$0")/../../.venv"
home=$PWD/perf_analyzer
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bin/pip download --quiet --no-deps --dest "$work" tritonclient==2.49.0 nvidia-cuda-runtime-cu12
for wheel in "$work"/*.whl; do bin/python -m zipfile -e "$wheel" "$work"; done
(
    cd "$work"
    download=(apt-get -qq -o APT::Sandbox::User=root download libb64-0d)
    "${download[@]}" || { apt-get -qq update && "${download[@]}"; }
    dpkg-deb -x libb64-0d_*.deb .
)
mkdir -p "$home"
cp "$work"/{tritonclient-*.data/data/bin/perf_analyzer,nvidia/cuda_runtime/lib/libcudart.so.12,usr/lib/*/libb64.so.0d} "$home"
chmod +x "$home/perf_analyzer"
printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/perf_analyzer "$@"\n' "$home" "$home" > bin/perf_analyzer
chmod +x bin/perf_analyzer
