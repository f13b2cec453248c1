#!/usr/bin/env bash
# Everything that wants a card, in one call of ten minutes. A machine with a card often has nvcc and PyTorch and no packages to
# install, so the programs are built where the packages are, for one architecture, and travel:
#
#     dev/gpu.sh --pack FOLDER [90]       builds into FOLDER (the number: 80 A100, 90 H100 and H200, 120 RTX 50)
#     dev/gpu.sh [FOLDER] [PART …]        runs there; without a FOLDER it builds here first
#
# The parts: tests sanitizer check speed peer. Each has a time limit of its own, none stops the others, and the last lines say
# what became of each. Their output is in $RESULTS, by default build/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/cuda/bin

PROGRAMS="train_cuda train_cuda_f32 train_cuda_f64 build/test_cuda_f64 build/test_cuda_f32 build/test_cuda_bf16 build/bench_gpu"
pack() {
    local jobs copy arch=${2:-90}
    jobs=$(nproc)
    [ "$arch" != 90 ] || arch=90a                       # with what only a Hopper has
    # in a copy: what is built here is for other instructions and libraries, and make cannot tell the two apart
    copy=$(mktemp -d) && cp -r ./*.h ./*.c train.cu Makefile ops lib run paper dev "$copy" || exit 1
    make -C "$copy" -j"$jobs" ARCH="-gencode arch=compute_$arch,code=sm_$arch" CFLAGS="-O3 -march=x86-64-v3" \
        LDLIBS="-l:libjansson.a -l:libz.a -l:libpcre2-8.a -l:libutf8proc.a -lm" $PROGRAMS || { rm -r "$copy"; exit 1; }
    mkdir -p "$1"
    for program in $PROGRAMS; do mv "$copy/$program" "$1" || exit 1; done
    rm -r "$copy"
}
[ "${1:-}" != --pack ] || { pack "${2:?a folder for the programs}" "${3:-90}"; exit; }

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || { echo "No GPU here (nvidia-smi names none). Without one: make test, and ./train_emu --check" >&2; exit 1; }
PARTS="tests sanitizer check speed peer"
bin=
if [ -d "${1:-}" ]; then bin=$1; shift; fi
for p in "$@"; do
    [[ " $PARTS " == *" $p "* ]] || { echo "dev/gpu.sh: no folder and no part is called $p" >&2; exit 1; }
done
if [ -z "$bin" ]; then
    bin=build/gpu_programs
    pack $bin "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)"
fi
RESULTS=${RESULTS:-build/gpu}
mkdir -p "$RESULTS" build
parts=${*:-$PARTS}
echo "== $gpu; $(nvcc --version 2>/dev/null | tail -n 1); $(nproc) processors"

tally=()
# part LIMIT NAME COMMAND …: its output into NAME.log; the tally says how it ended and how long it took.
part() {
    local limit=$1 name=$2 start status said
    shift 2
    start=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$RESULTS/$name.log" 2>&1
    status=$?
    case $status in 0) said="✓";; 124 | 137) said="✗ stopped after $limit s:";; *) said="✗ status $status:";; esac
    echo "$said $name, $(($(date +%s) - start)) s: $(grep -v '^$' "$RESULTS/$name.log" | tail -n 1)" >"$RESULTS/$name.tally"
}
finished() { for name in "$@"; do tally+=("$(cat "$RESULTS/$name.tally")"); cat "$RESULTS/$name.tally"; done; }

# A tool of compute-sanitizer counts only if it says itself that it ran and found nothing, and if the test under it passed. What
# racecheck says of cuBLAS's kernels (nvjet_…), whose tiles the card's copy engine writes, is not counted.
sanitize() {
    local said=$RESULTS/sanitized.$1.$2 found theirs
    compute-sanitizer --tool "$1" --print-limit 100000 "$bin/test_cuda_$2" gpu-ops >"$said" 2>&1
    found=$(sed -nE 's/^========= (ERROR|RACECHECK) SUMMARY: ([0-9]+) (errors?|hazards? displayed).*/\2/p' "$said")
    theirs=$(grep -cE 'Race reported between .* at nvjet_' "$said")
    if [ "${found:-none}" != "$theirs" ] || ! grep -qE '^1 passed, 0 failed' "$said"; then
        tail -n 30 "$said"
        return 1
    fi
    echo "$found found, $theirs of them in cuBLAS"
}
export -f sanitize
export bin RESULTS

for p in $parts; do
    case $p in
    tests)                              # a CPU in double beside them: the three together
        for precision in f64 f32 bf16; do
            OMP_NUM_THREADS=$((($(nproc) + 2) / 3)) part 200 "tests-$precision" "$bin/test_cuda_$precision" &
        done
        wait
        finished tests-f64 tests-f32 tests-bf16;;
    check)
        for program in train_cuda_f64 train_cuda_f32 train_cuda; do
            part 60 "check-$program" "$bin/$program" --check --no-shuffle --batch 2
            finished "check-$program"
        done;;
    speed)
        part 200 speed "$bin/bench_gpu" --profile 7b 16x1024 4x4096 lora bone bat bat-row
        part 60 default "$bin/train_cuda"
        finished speed default
        cat "$RESULTS/speed.log";;
    peer)
        part 150 peer python3 dev/bench_gpu_peer.py --shape 4096,11008,32,32,32,32000 --load 16x1024 4x4096
        finished peer
        grep -E "PEFT|attention" "$RESULTS/peer.log";;
    sanitizer)
        names=()
        for precision in f32 bf16; do
            for tool in memcheck racecheck initcheck synccheck; do
                part 150 "$tool-$precision" bash -c "sanitize $tool $precision" &
                names+=("$tool-$precision")
            done
        done
        wait
        finished "${names[@]}";;
    esac
done
echo "== the tally, $gpu"
printf '%s\n' "${tally[@]}"
! printf '%s\n' "${tally[@]}" | grep -q '^✗'
