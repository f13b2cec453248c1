#!/usr/bin/env bash
# Two ranks of one thread beside one process of two: the same steps, by turns, so that a neighbour of both counts for both.
# Prints the median of tokens a second, and the ratio.
#
#   dev/bench_ranks.sh [ROUNDS] [SHAPE …]       make train train_mpi build/15m build/110m first
set -euo pipefail
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
rounds=${1:-5}
shapes=${*:2}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
tr -d '{}"' <data/train.jsonl >"$dir/rows.txt"

speeds() { sed -n 's/.*"tok_per_s":\([0-9]*\)}/\1/p' "$1" | tail -n +2; }      # the first step maps the base
median() { sort -n "$1" | awk '{ x[NR] = $1 } END { print x[int((NR + 1) / 2)] }'; }

for shape in ${shapes:-15m 110m}; do
    for method in bone full; do
        steps=$([ "$shape" = 110m ] && echo 3 || echo 6)
        args="--model build/$shape --data $dir/rows.txt --seq 256 --batch 4 --accum 2 --steps $steps --method $method"
        rm -f "$dir"/*.speeds
        for _ in $(seq "$rounds"); do
            ./train $args --threads 2 --log "$dir/log" --out "$dir/out" >"$dir/stdout"
            speeds "$dir/log" >>"$dir/threads.speeds"
            mpirun -q --bind-to none -n 2 ./train_mpi $args --threads 1 --log "$dir/log" --out "$dir/out" >"$dir/stdout"
            speeds "$dir/log" >>"$dir/ranks.speeds"
        done
        threads=$(median "$dir/threads.speeds") ranks=$(median "$dir/ranks.speeds")
        echo "$shape $method: 1 process, 2 threads $threads tokens/s; 2 ranks, 1 thread $ranks; ratio" \
            "$(awk "BEGIN { printf \"%.2f\", $ranks / $threads }")"
    done
done
