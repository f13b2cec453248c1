#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds everything, runs the tests of CPU against GPU three times, then under each tool of
# compute-sanitizer, prints the table of --check, and measures. Ends with an error at the first thing that is not right.
set -euo pipefail
cd "$(dirname "$0")/.."

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [ -z "$gpu" ]; then
    echo "No GPU here (nvidia-smi names none). Without one: make test, and ./train_emu --check" >&2
    exit 1
fi
PATH=$PATH:/usr/local/cuda/bin
command -v nvcc compute-sanitizer >/dev/null || { echo "nvcc and compute-sanitizer are needed: install the CUDA Toolkit" >&2; exit 1; }
echo "== $gpu; $(nvcc --version | tail -n 1)"

make train train_cuda train_cuda_f32 train_cuda_f64 build/test_cuda_f64 build/test_cuda_f32 build/test_cuda_bf16

echo "== CPU against GPU, three times"
for precision in f64 f32 bf16; do
    for run in 1 2 3; do
        echo "-- $precision, run $run"
        "build/test_cuda_$precision"
    done
done

# A tool counts only if it says itself that it ran and found nothing, and if the tests under it passed.
echo "== compute-sanitizer"
for precision in f64 f32 bf16; do
    for tool in memcheck racecheck initcheck synccheck; do
        log=build/$tool.$precision.log
        compute-sanitizer --tool "$tool" --error-exitcode 99 "build/test_cuda_$precision" gpu-ops >"$log" 2>&1 || { tail -n 30 "$log"; echo "✗ $tool, $precision"; exit 1; }
        grep -q '^========= COMPUTE-SANITIZER' "$log" || { echo "✗ $tool, $precision: did not run, see $log"; exit 1; }
        grep -qE '^========= (ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed)' "$log" || { echo "✗ $tool, $precision: see $log"; exit 1; }
        grep -qE '^1 passed, 0 failed' "$log" || { echo "✗ $tool, $precision: the tests did not pass, see $log"; exit 1; }
        echo "✓ $tool, $precision: $(grep -E 'SUMMARY' "$log")"
    done
done

echo "== one step of the bundled model on CPU and GPU"
for program in train_cuda_f64 train_cuda_f32 train_cuda; do
    "./$program" --check --no-shuffle --batch 2 >"build/$program.check"
    echo "$program: $(tail -n 2 "build/$program.check" | tr '\n' ' ')"
done
cat build/train_cuda_f32.check

if make -n bench-gpu >/dev/null 2>&1; then make bench-gpu; fi
