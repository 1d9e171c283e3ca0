#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, in one call: the mechanism on CUDA (methods, NF4, attention, paged
# optimizer), the tests of 4-bit bases, the quickstart, then speed and memory against transformers with peft (last, with a
# short table; what could not run is named). Without CUDA it says so, and runs on the CPU.
# bash benchmarks/gpu.sh OUT      (OUT: a folder for what was measured)
set -euo pipefail
out=${1:?give a folder for the results}
mkdir -p "$out"
python benchmarks/gpu.py | tee "$out/gpu.md"
python -m pytest -q -rs tests/test_quant.py tests/test_qlora.py 2>&1 | tee "$out/tests.txt"
deltatune train --out "$out/quickstart" 2>&1 | tee "$out/quickstart.txt"
python benchmarks/speed.py --gpu --rounds 2 --store "$out/speed.jsonl" 2>&1 | tee "$out/speed.txt"
