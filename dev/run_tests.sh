#!/usr/bin/env bash
# What make test runs: dev/run_tests.sh PART …. Each part is a program that prints its claims and, last, how many of them passed;
# the last line here adds them up. An emulated GPU has one CPU's work: such parts run test by test beside each other, the
# others, which use all CPUs, alone. Under AddressSanitizer runs the test that draws plans by chance.
set -u
cd "$(dirname "$0")/.."
logs=build/tests
rm -rf $logs
mkdir -p $logs

gpu_tests="gpu-bits gpu-ops gpu-methods gpu-allocations gpu-base"        # the longest first

run() { # a part, and if not all of it the test: into its log, and beside it how long it took
    local start only=${2:-} log=$logs/${1##*/}${2:+.$2}
    start=$(date +%s)
    case $1 in
    build/test_asan) only=splits ;;
    dev/mutants.sh) only='--sample 20' ;;
    esac
    ASAN_OPTIONS=detect_leaks=0 "./$1" $only >"$log" 2>&1
    echo "-- $1${2:+ $2}, $(($(date +%s) - start)) s" >"$log.head"
}

counts() { grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$1" | tail -n 1; }

show() { # what has run. What has not come to its counts has failed
    local log=$logs/${1##*/}${2:+.$2}
    cat "$log.head" "$log"
    [ -n "$(counts "$log")" ] || echo "0 passed, 1 failed, 0 skipped" | tee -a "$log"
}

show_together() {
    [ $# -gt 0 ] || return
    for t in $gpu_tests; do
        for part; do
            OMP_NUM_THREADS=1 run "$part" "$t" &
            while [ "$(jobs -r | wc -l)" -ge "$(nproc)" ]; do wait -n; done
        done
    done
    wait
    for part; do
        for t in $gpu_tests; do show "$part" "$t"; done
    done
}

emulated=()
for part; do
    case $part in
    build/test_emu_*) emulated+=("$part") ;;
    *) run "$part"; show "$part" ;;
    esac
done
show_together "${emulated[@]}"
if [ -z "${GPU:-}" ]; then
    for p in f64 f32 bf16; do
        for t in $gpu_tests; do echo "- $t in $p on a GPU: skipped, no GPU here"; done
    done
    echo "0 passed, 0 failed, 15 skipped" >$logs/gpu
fi
for log in $logs/*; do [ "${log%.head}" = "$log" ] && counts "$log"; done |
    awk '{p += $1; f += $3; s += $5} END {print p " passed, " f " failed, " s " skipped"; exit f > 0}'
