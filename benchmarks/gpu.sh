#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, in one call: the mechanism on CUDA, then the quickstart.
# bash benchmarks/gpu.sh OUT      (OUT: a folder for what was measured)
set -euo pipefail
out=${1:?give a folder for the results}
mkdir -p "$out"
python benchmarks/gpu.py | tee "$out/gpu.md"
deltatune train --out "$out/quickstart" 2>&1 | tee "$out/quickstart.txt"
