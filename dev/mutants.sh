#!/usr/bin/env bash
# Would the tests notice? Each line below breaks the code in one place (a sign, a scale, a dropped term, a transposed
# index) and names the test that must turn red. A mutant that does not change the file, does not compile, or goes
# unnoticed is a failure.
#
#   what                     | file       | sed expression                                                    | test        | method
mutants='
full: sign                   | adapters.h | s/matmul_tn(l->dW, dy, x, 1, ADD)/matmul_tn(l->dW, dy, x, -1, ADD)/ | gradients | full
full: dropped term           | adapters.h | /^static void full_backward/,/^}/{/matmul_nn(dx/d}                 | gradients   | full
full: transposed             | adapters.h | s/matmul_tn(l->dW, dy, x,/matmul_tn(l->dW, x, dy,/                | gradients   | full
frozen: scale                | adapters.h | s/matmul_tn(l->dD, dy, x, 1, ADD)/matmul_tn(l->dD, dy, x, 2, ADD)/ | gradients  | frozen
frozen: ΔW left out of dx    | adapters.h | /^static void frozen_backward/,/^}/s/frozen_weight(m, l)/l->W/    | gradients   | frozen
frozen: transposed           | adapters.h | s/matmul_tn(l->dD, dy, x,/matmul_tn(l->dD, x, dy,/                | gradients   | frozen
lora: sign                   | adapters.h | s/matmul_tn(l->dB, dy, l->h, l->scale, ADD)/matmul_tn(l->dB, dy, l->h, -l->scale, ADD)/ | gradients | lora
lora: scale                  | adapters.h | s/matmul_nn(dh, dy, l->B, l->scale, SET)/matmul_nn(dh, dy, l->B, 1, SET)/ | gradients | lora
lora: dropped term           | adapters.h | /matmul_nn(dx, dh, l->A, 1, ADD)/d                                | gradients   | lora
lora: transposed             | adapters.h | s/matmul_tn(l->dB, dy, l->h,/matmul_tn(l->dB, l->h, dy,/          | gradients   | lora
rslora: the scale of lora     | adapters.h | s/l->scale = m->p.alpha \/ sqrt(m->p.rank)/l->scale = m->p.alpha \/ m->p.rank/ | definition | rslora
pissa: W keeps its start     | adapters.h | s/^    give_up_start(m, l, +1);$/    (void)m;/                        | start-given | pissa
pissa: wrong root            | adapters.h | s/sqrt((double)sigma\[k\] \/ l->scale)/sqrt((double)sigma[k])/    | start-given | pissa
dora: sign                   | adapters.h | s/matmul_tn(CB, C, l->B, l->scale, SET)/matmul_tn(CB, C, l->B, -l->scale, SET)/ | gradients | dora
dora: scale                  | adapters.h | s/broadcast_mul(C, l->B, l->dsquares, 2 \* l->scale, SET)/broadcast_mul(C, l->B, l->dsquares, l->scale, SET)/ | gradients | dora
dora: dropped term           | adapters.h | /matmul_tn(l->dA, C, l->W, 1, ADD)/d                              | gradients   | dora
dora: W Aᵀ for V Aᵀ          | adapters.h | /matmul_nn(l->VA, l->B, AA, l->scale, ADD)/d                      | definition  | dora
dora: always exact           | adapters.h | s/if (!m->p.dora_detach) dora_norm_backward/dora_norm_backward/   | goldens     |
lora-ga: U as V              | adapters.h | s/\*U = f.U + (size_t)r \* (size_t)out/*U = f.U/                  | goldens     |
lora-ga: scale               | adapters.h | s/(wide)stable \* f.sigma\[r + k\]/f.sigma[r + k]/                | goldens     |
lora-ga: no dx               | adapters.h | /^static void lora_ga_backward/,/^}/s/lora_backward(m, l, dx, dy, x)/lora_backward(m, l, (mat){0}, dy, x)/ | gradients | lora-ga
lora-ga: last batch alone    | adapters.h | s/for (int i = 0; i < batches; i++) model_step/for (int i = 1; i < batches; i++) model_step/ | frozen-is-full |
bone: sign                   | adapters.h | s/matmul_tn(l->dD, S, dy, 1, ADD)/matmul_tn(l->dD, S, dy, -1, ADD)/ | gradients | bone
bone: scale                  | adapters.h | s/matmul_nt(dS, dy, l->D, 1,/matmul_nt(dS, dy, l->D, 0.5,/        | gradients   | bone
bone: dropped term           | adapters.h | /^static void bone_backward/,/^}/{/shard_tile(dx, dS)/d}          | gradients   | bone
bone: q, k, v not summed     | adapters.h | /^static void bone_backward/,/^}/s/l->first ? SET : ADD/SET/      | gradients   | bone
bone: transposed shard index | train.c    | /^void shard_tile/,/^}/s/xn\[j + c\] += sn\[c\]/xn[j + c] += sn[(j + c) \/ ((x.cols + r - 1) \/ r)]/ | gradients | bone
mini: sign                   | adapters.h | s/matmul_tn(l->dD, S, dz, 1, ADD)/matmul_tn(l->dD, S, dz, -1, ADD)/ | gradients | mini
mini: scale                  | adapters.h | s/matmul_nt(dS, dz, l->D, 1,/matmul_nt(dS, dz, l->D, 0.5,/        | gradients   | mini
mini: dropped term           | adapters.h | /^static void mini_backward/,/^}/{/shard_tile(dx, dS)/d}          | gradients   | mini
mini: transposed             | adapters.h | s/matmul_tn(l->dD, S, dz,/matmul_tn(l->dD, dz, S,/                | gradients   | mini
bat: sign                    | adapters.h | s/matmul_tn(dW, dy, x, 1, SET)/matmul_tn(dW, dy, x, -1, SET)/     | gradients   | bat
bat: scale                   | adapters.h | s/matmul_nn(dS, dy, stacked(l->B), 1,/matmul_nn(dS, dy, stacked(l->B), 2,/ | gradients | bat
bat: dropped term            | adapters.h | /matmul_tn(stacked(l->dB), dy, S, 1, ADD)/d                       | gradients   | bat
recompute: attention left out | model.h   | /recompute == 2) attention_block/d                                | recompute   |
bat: V dV, not dV V          | adapters.h | s/block_rows(l->W, r), block_rows(dW, r), 1, ADD/block_rows(dW, r), block_rows(l->W, r), 1, ADD/ | gradients | bat
bat: W for its copy in dx    | adapters.h | /^static void bat_backward/,/^}/s/matmul_nn(dx, dy, W, 1, ADD)/matmul_nn(dx, dy, l->W, 1, ADD)/ | gradients | bat
bat-row: sign                | adapters.h | s/column_blocks(du, r), column_blocks(x, r), 1, ADD/column_blocks(du, r), column_blocks(x, r), -1, ADD/ | gradients | bat-row
bat-row: scale               | adapters.h | s/column_blocks(du, r), l->B, 1, ADD/column_blocks(du, r), l->B, 0.5, ADD/ | gradients | bat-row
bat-row: dropped term        | adapters.h | /shard_tile(du, g)/d                                              | gradients   | bat-row
bat-row: x du, not du x      | adapters.h | s/column_blocks(du, r), column_blocks(x, r), 1, ADD/column_blocks(x, r), column_blocks(du, r), 1, ADD/ | gradients | bat-row
bat-row: row j for column j  | adapters.h | /^static void bat_row_forward/,/^}/s/shard_tile(y, sum)/zero(sum)/ | definition | bat-row
rmsnorm: dropped term        | train.c    | s/rho \* (wc\[c\] \* dn\[c\] - factor \* xn\[c\])/rho * wc[c] * dn[c]/ | ops     |
rope: sign                   | train.c    | s/s = (real)sign \* sine\[i\]/s = sine[i]/                        | ops         |
attention: dropped Δ         | train.c    | s/p\[c\] \* (ds\[c\] - delta)/p[c] * ds[c]/                       | ops         |
attention: wrong head        | train.c    | s/h \/ group \* d, h \* d, before/h % group * d, h * d, before/   | attention   |
attention: sees the future   | train.c    | /^void attention_forward/,/^}/s/seen = a.before + r + 1/seen = a.keys/ | attention   |
swiglu: sign                 | train.c    | s/(1 + g\[c\] \* (1 - sigma))/(1 - g[c] * (1 - sigma))/           | ops         |
cross-entropy: no label      | train.c    | /z\[labels\[n\]\] -= (real)scale/d                                | ops         |
magnitude: half of dq        | train.c    | s/(2 \* q \* root)/(4 * q * root)/                                | ops         |
broadcast: row for column    | train.c    | s/gn\[rows ? 0 : c\]/gn[0]/                                       | ops         |
matmul: last rows            | train.c    | s/i1 - i < MR ? i1 - i : MR, left/MR, left/                       | matmul      |
matmul: later parts of K     | train.c    | s/p->scale, k0 ? ADD : p->mode)/p->scale, p->mode)/               | matmul      |
adamw: no correction         | train.c    | s/root = (wide)sqrt(1 - pow(0.999, t))/root = 1/                  | adamw       |
overwrite, not accumulate    | adapters.h | s/matmul_tn(l->dA, dh, x, 1, ADD)/matmul_tn(l->dA, dh, x, 1, SET)/ | twice      |
'

build() { # directory: compiles the double tests of the sources in it
    ${CC:-cc} -std=gnu11 -O1 -march=native -w -fopenmp -DDOUBLE "$1/test_all.c" "$1/tokenizer.c" -o "$1/test" -lcjson -lm
}

try() { # index, what, file, expression, test, method
    local dir=build/mutant.$1
    rm -rf "$dir"; mkdir -p "$dir"
    cp model.h adapters.h train.c tokenizer.c test_all.c "$dir"
    sed -i "$4" "$dir/$3"
    if cmp -s "$3" "$dir/$3"; then echo "✗ $2: the expression changes nothing"
    elif ! build "$dir" 2>"$dir/errors"; then echo "✗ $2: does not compile"; head -3 "$dir/errors"
    elif OMP_NUM_THREADS=1 timeout 120 "$dir/test" $5 $6 >"$dir/log" 2>&1; then echo "✗ $2: $5 stays green"
    else echo "✓ $2: $5 turns red"; fi
    rm -rf "$dir"
}

mkdir -p build
trim() { local s="${1#"${1%%[! ]*}"}"; echo "${s%"${s##*[! ]}"}"; }
i=0
while IFS='|' read -r what file expression test method; do
    [ -n "$(trim "$what")" ] || continue
    i=$((i + 1))
    try "$i" "$(trim "$what")" "$(trim "$file")" "$(trim "$expression")" "$(trim "$test")" "$(trim "$method")" >"build/mutant.$i.log" &
    while [ "$(jobs -r | wc -l)" -ge "$(nproc)" ]; do wait -n; done
done <<<"$mutants"
wait
cat $(seq -f 'build/mutant.%g.log' 1 $i) | tee build/mutants.log
rm -f build/mutant.*.log
failed=$(grep -c '✗' build/mutants.log)
echo "$(grep -c '✓' build/mutants.log) passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
