#!/usr/bin/env bash
# What only a GPU can show: WAN 1.3B's real size, 81 x 480 x 832, random weights, bf16; results in benchmarks/results.
#   ./benchmarks/gpu.sh             # all, command after command, each under ten minutes on an H100
#   ./benchmarks/gpu.sh layers      # one of: layers steps sampling scaling runs memory data tests
#   SIZE=small RESULTS=/tmp ./benchmarks/gpu.sh steps       # the script itself, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python}"
RESULTS="${RESULTS:-benchmarks/results}"
SIZE="${SIZE:-1.3b}"
failed=0

speed() { # name, parts
    "$PYTHON" benchmarks/speed.py --size "$SIZE" --num_rounds 3 --output "$RESULTS/gpu_$1.md" --parts "${@:2}" || failed=1
}

for command in "${@:-layers steps sampling scaling runs memory data tests}"; do
    for name in $command; do
        echo "=== $name"
        case "$name" in
        layers) speed layers attention modulation compilation checkpointing ;;
        steps) speed steps step ;;
        sampling) speed sampling vae sampling ;;
        scaling) speed scaling scaling context ;;
        runs) speed runs precision parts startup ;;
        memory) "$PYTHON" benchmarks/memory.py --size "$SIZE" | tee "$RESULTS/gpu_memory.md" || failed=1 ;;
        data) "$PYTHON" benchmarks/data.py --size "$SIZE" | tee "$RESULTS/gpu_data.md" || failed=1 ;;
        tests) "$PYTHON" -m pytest -m gpu || failed=1 ;;
        *) echo "there is no $name; see the head of this file" >&2; exit 2 ;;
        esac
    done
done
exit "$failed"
