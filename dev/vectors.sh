#!/usr/bin/env bash
# The same bits on every processor. The program is compiled with vectors of 16 bytes; three steps of it must write the adapter
# that ./train writes with vectors of this machine's width. A part of make test.
set -u
cd "$(dirname "$0")/.."
dir=build/vectors
[ "$(uname -m)" = x86_64 ] || { echo "0 passed, 0 failed, 4 skipped"; exit; }
rm -rf $dir
mkdir -p $dir
cp -r ./*.[ch] Makefile ops lib run paper $dir
sed -i -E 's/VECTOR = [0-9]+, MR = [0-9]+/VECTOR = 16, MR = 6/' $dir/ops/gemm.h
MAKEFLAGS= make -s -C $dir -j"$(nproc)" CFLAGS="-O3 -march=native -mprefer-vector-width=128 -U__AVX512BF16__" train || exit 1
head -n 4 data/train.jsonl >$dir/rows.jsonl

adapter() { # program, options: the adapter's checksum
    rm -rf $dir/out
    "$1" --data $dir/rows.jsonl --val $dir/rows.jsonl --max-new 1 --steps 3 --out $dir/out "${@:2}" >$dir/log 2>&1 ||
        { cat $dir/log >&2; return 1; }
    sha256sum <$dir/out/adapter_model.safetensors
}

passed=0 failed=0
for options in "--method bone" "--method pissa --bf16" "--method dora" "--model base-rwkv6 --method lora"; do
    expected=$(adapter ./train $options)
    if [ -n "$expected" ] && [ "$(adapter $dir/train $options)" = "$expected" ]; then sign=✓ passed=$((passed + 1))
    else sign=✗ failed=$((failed + 1)); fi
    echo "$sign vectors          of any width give the same adapter ($options)"
done
rm -rf $dir
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
