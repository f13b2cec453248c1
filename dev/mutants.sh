#!/usr/bin/env bash
# Would the tests notice? Each line below breaks the code in one place (a sign, a scale, a dropped term, a transposed
# index) and names the test that must turn red. Further faults are planted by rule, in every file that is taught (dev/mutate.awk):
# there, any of a list of tests may turn red. A mutant that does not change the file, does not compile, or goes unnoticed is
# a failure; those planted by rule that change nothing are listed in dev/mutants.equivalent, each with its reason. A word
# keeps it to the mutants whose description has that word, or to a file. Mutants of train.cu run as dev/cuda_on_cpu.h emulates
# it, with threads and blocks in the order named. A line of the table that begins with a space goes on with the row above it.
#
#   dev/mutants.sh               all of them
#   dev/mutants.sh bat-row       those with this word, or of this file
#   dev/mutants.sh --sample 20   every so-and-so many of the table, 20 in all
#   dev/mutants.sh --rules       those planted by rule alone. FROM=15 SHARE=30 RULED=lib/svd.h TESTS='svd residual' draws others
#
#   what                     | file       | sed expression                                                | test | method or order
mutants='
full: sign                   | adapters.h | s/matmul_tn(l->dW, dy, x, 1, ADD)/matmul_tn(l->dW, dy, x, -1, ADD)/ | gradients | full
full: dropped term           | adapters.h | /^static void full_backward/,/^}/{/matmul_nn(dx/d}                | gradients   | full
full: transposed             | adapters.h | s/matmul_tn(l->dW, dy, x,/matmul_tn(l->dW, x, dy,/                | gradients   | full
frozen: scale                | adapters.h |
    s/matmul_tn(l->dD, dy, x, 1, ADD)/matmul_tn(l->dD, dy, x, 2, ADD)/                                      | gradients   | frozen
frozen: ΔW left out of dx    | adapters.h | /^static void frozen_backward/,/^}/s/frozen_weight(m, l)/l->W/  | gradients   | frozen
frozen: transposed           | adapters.h | s/matmul_tn(l->dD, dy, x,/matmul_tn(l->dD, x, dy,/              | gradients   | frozen
lora: sign                   | adapters.h |
    s/matmul_tn(l->dB, dy, l->h, l->scale, ADD)/matmul_tn(l->dB, dy, l->h, -l->scale, ADD)/                   | gradients   | lora
lora: scale                  | adapters.h |
    s/matmul_nn(dh, dy, l->B, l->scale, SET)/matmul_nn(dh, dy, l->B, 1, SET)/                                 | gradients   | lora
lora: dropped term           | adapters.h |
    s/matmul_nn(dx, dh, l->A, 1, mode)/matmul_nn(dx, dh, l->A, 0, mode)/                                      | gradients   | lora
lora: transposed             | adapters.h | s/matmul_tn(l->dB, dy, l->h,/matmul_tn(l->dB, l->h, dy,/          | gradients   | lora
rslora: the scale of lora    | adapters.h |
    s/l->scale = m->p.alpha \/ sqrt(m->p.rank)/l->scale = m->p.alpha \/ m->p.rank/                          | definition  | rslora
pissa: the start stays in    | adapters.h |
    s/matmul_nt(y, h0, l->B0, -l->scale, mode)/matmul_nt(y, h0, l->B0, 0, mode)/                              | zero-start  |
pissa: sign of the start     | adapters.h |
    s/matmul_nt(y, h0, l->B0, -l->scale, mode)/matmul_nt(y, h0, l->B0, l->scale, mode)/                       | zero-start  |
pissa: the start left out of dx | adapters.h |
    s/matmul_nn(dx, dh0, l->A0, 1, mode)/matmul_nn(dx, dh0, l->A0, 0, mode)/                                 | gradients   | pissa
pissa: scale                 | adapters.h |
    s/matmul_nn(dh0, dy, l->B0, -l->scale, SET)/matmul_nn(dh0, dy, l->B0, -1, SET)/                          | gradients   | pissa
pissa: merged with its start | adapters.h | /^static void pissa_merge/,/^}/{/l->B0/d}                         | merge       |
pissa: wrong root            | adapters.h | s/sqrt((double)sigma\[k\] \/ l->scale)/sqrt((double)sigma[k])/    | residual    |
lora: A = B = 0, which no step leaves | adapters.h |
    /^static void lora_init/,/^}/s/put(l->A, a, TYPE_OF(wide));/zero(l->A);/                                  | zero-start  | lora
lora: A = B = 0 learns nothing | adapters.h |
    /^static void lora_init/,/^}/s/put(l->A, a, TYPE_OF(wide));/zero(l->A);/                                  | gsm8k       | lora
svd: Gram-Schmidt once       | lib/svd.h  | s/again < 2; again++/again < 1; again++/                          | svd         |
svd: the next block forgotten | lib/svd.h | s/else copy(next, rows_of(V, room, b));/else zero(next);/          | svd         |
svd: no second start         | lib/svd.h  |
    s/if (settled && sum - before <= 4 \* least \* sum) break;/if (settled) break;/                           | svd         |
svd: settled too early       | lib/svd.h  | s/sum += h \* h \/ (2 \* sigma);/sum += 1e-9 * h * h;/                | svd         |
svd: nowhere new             | lib/svd.h  | s/if (!orthonormal(V, i, b)) return;/orthonormal(V, i, b); if (i) return;/ | svd  |
dora: sign                   | adapters.h |
    s/matmul_tn(CB, C, l->B, l->scale, SET)/matmul_tn(CB, C, l->B, -l->scale, SET)/                           | gradients   | dora
dora: scale                  | adapters.h |
    s/broadcast_mul(C, l->B, l->dsquares, 2 \* l->scale, SET)/broadcast_mul(C, l->B, l->dsquares, l->scale, SET)/
    | gradients | dora
dora: dropped term           | adapters.h | /matmul_tn(l->dA, C, l->W, 1, ADD)/d                              | gradients   | dora
dora: W Aᵀ for V Aᵀ          | adapters.h | /matmul_nn(l->VA, l->B, AA, l->scale, ADD)/d                      | definition  | dora
dora: always exact           | adapters.h | s/if (!m->p.dora_detach) dora_norm_backward/dora_norm_backward/   | goldens     |
lora-ga: U as V              | adapters.h | s/\*U = f.U + (size_t)r \* (size_t)out/*U = f.U/                  | goldens     |
lora-ga: scale               | adapters.h | s/(wide)stable \* f.sigma\[r + k\]/f.sigma[r + k]/                | goldens     |
lora-ga: no dx               | adapters.h |
    /^static void lora_ga_backward/,/^}/s/pissa_backward(m, l, dx, dy, x, mode)/pissa_backward(m, l, (mat){0}, dy, x, mode)/
    | gradients | lora-ga
lora-ga: last batch alone    | adapters.h |
    s/for (int i = 0; i < batches; i++) model_step/for (int i = 1; i < batches; i++) model_step/              | frozen-is-full |
dora: 0/0 of a row of zeros  | ops/cpu.c  | s/q <= 0 ? 1 : ((wide \*)m.p)\[i\]/((wide *)m.p)[i]/               | zero-rows   |
dora: 0/0 in its gradient    | ops/cpu.c  | s/int none = q <= 0;/int none = 0;/                               | zero-rows   |
bone: sign                   | adapters.h | s/matmul_tn(l->dD, S, dy, 1, ADD)/matmul_tn(l->dD, S, dy, -1, ADD)/ | gradients | bone
bone: scale                  | adapters.h | s/matmul_nt(dS, dy, l->D, 1,/matmul_nt(dS, dy, l->D, 0.5,/        | gradients   | bone
bone: dropped term           | adapters.h | /^static void bone_backward/,/^}/{/shard_tile(dx, dS)/d}          | gradients   | bone
bone: S(x) of another x      | adapters.h | /^static void bone_forward/,/^}/{/shard_sum(S, x)/d}              | definition  | bone
bone: S(x) of the forward pass | adapters.h | /^static void bone_backward/,/^}/{/shard_sum(S, x)/d}           | gradients   | bone
bone: S(x) for v alone       | adapters.h |
    /^static void bone_backward/,/^}/s/l->first) shard_sum/l->last) shard_sum/                                | gradients   | bone
bone: q, k, v not summed     | adapters.h | /^static void bone_backward/,/^}/s/l->first ? SET : ADD/SET/      | gradients   | bone
bone: transposed shard index | ops/cpu.c  |
    /^void shard_tile/,/^}/s/xn\[j + c\] += sn\[c\]/xn[j + c] += sn[(j + c) \/ ((x.cols + r - 1) \/ r)]/      | gradients   | bone
mini: sign                   | adapters.h | s/matmul_tn(l->dD, S, dz, 1, ADD)/matmul_tn(l->dD, S, dz, -1, ADD)/ | gradients | mini
mini: scale                  | adapters.h | s/matmul_nt(dS, dz, l->D, 1,/matmul_nt(dS, dz, l->D, 0.5,/        | gradients   | mini
mini: S(x) of the forward pass | adapters.h | /^static void mini_backward/,/^}/{/shard_sum(S, x)/d}           | gradients   | mini
mini: dropped term           | adapters.h | /^static void mini_backward/,/^}/{/shard_tile(dx, dS)/d}          | gradients   | mini
mini: transposed             | adapters.h | s/matmul_tn(l->dD, S, dz,/matmul_tn(l->dD, dz, S,/                | gradients   | mini
bat: sign                    | adapters.h | s/matmul_tn(dW, dy, x, 1, SET)/matmul_tn(dW, dy, x, -1, SET)/     | gradients   | bat
bat: scale                   | adapters.h |
    s/matmul_nn(dS, dy, stacked(l->B), 1,/matmul_nn(dS, dy, stacked(l->B), 2,/                                | gradients   | bat
bat: S(x) of the forward pass | adapters.h | /^static void bat_backward/,/^}/{/shard_sum(S, x)/d}             | gradients   | bat
bat: dropped term            | adapters.h | /matmul_tn(stacked(l->dB), dy, S, 1, ADD)/d                       | gradients   | bat
rows: answer with a space of its own | run/dialogue.h | s/ids_of(t, answer, !\*prompt,/ids_of(t, answer, 1,/ | prompt-edge |
rows: first token of the answer not learnt | run/dialogue.h | s/^    r.prompt = r.n;/    r.prompt = r.n + 1;/ | prompt-edge |
special tokens: always a space | tokenizer.c | s/t->behind != NEVER \&\&/1 \&\&/                              | special-tokens |
special tokens: two spaces   | tokenizer.c | s/t->behind == UNLESS_SPACE \&\&/0 \&\&/                         | special-tokens |
special tokens: the shorter  | tokenizer.c | s/a->text.n > found->text.n/a->text.n < found->text.n/           | special-tokens |
special tokens: no rstrip    | tokenizer.c | s/while (a->rstrip/while (0/                                     | special-tokens |
special tokens: no lstrip    | tokenizer.c | s/while (a->lstrip/while (0/                                     | special-tokens |
special tokens: in mid-word  | tokenizer.c | s/a->single_word \&\& !stands_alone/0 \&\& !stands_alone/        | special-tokens |
stops: the first of a list   | lib/config.h |
    s/json_is_array(ids) ? json_array_size(ids) :/json_is_array(ids) ? 1 :/                                 | stops       |
layout: the last layer decides | model.h  | s/^    m->used.ACT. = most.act;/    (void)most.act;/                  | uneven      |
cache: training writes it, too | llama.h    | s/if (b->cached)/if (m->p.cache_rows)/                             | splits      |
views: a row too many        | model.h    | s/rows_of(\*t->value, 0, rows)/rows_of(*t->value, 1, rows)/ | splits |
recompute: attention left out | llama.h    | /recompute == 2) attention_block/d                                | recompute   |
bat: V dV, not dV V          | adapters.h |
    s/block_rows(l->W, r), block_rows(dW, r), 1, ADD/block_rows(dW, r), block_rows(l->W, r), 1, ADD/          | gradients   | bat
bat: W for its copy in dx    | adapters.h |
    /^static void bat_backward/,/^}/s/matmul_nn(dx, dy, W, 1, mode)/matmul_nn(dx, dy, l->W, 1, mode)/         | gradients   | bat
bat-row: sign                | ops/cpu.c  |
    s/matmul_tn(dB, du, column_blocks(x, r), 1,/matmul_tn(dB, du, column_blocks(x, r), -1,/                | gradients   | bat-row
bat-row: scale               | ops/cpu.c  |
    s/column_blocks(dx, r), du, B, 1, ADD/column_blocks(dx, r), du, B, 0.5, ADD/                           | gradients   | bat-row
bat-row: dropped term        | ops/cpu.c  | /shard_tile(dx_tilde, g)/d                                     | gradients   | bat-row
bat-row: x du, not du x      | ops/cpu.c  |
    s/matmul_tn(dB, du, column_blocks(x, r)/matmul_tn(dB, column_blocks(x, r), du/                         | gradients   | bat-row
bat-row: row j for column j  | adapters.h |
    /^static void bat_row_forward/,/^}/s/shard_tile(y, sum)/zero(sum)/                                     | definition  | bat-row
sum: last terms left out     | ops/host.h |
    s/for (int i = from_; i < (n); i++)/for (int i = from_; i < from_; i++)/                                | beyond-blocks |
sum: a fourth of the sums left out | ops/host.h |
    s/^    for (int l_ = 0; l_ < 4; l_++)/    for (int l_ = 0; l_ < 2; l_++)/                                | beyond-blocks |
sum: every other one left out | ops/host.h | s/from_ += sums_) {/from_ += 2 * sums_) {/              | beyond-blocks |
rmsnorm: dropped term        | ops/cpu.c  | s/rho \* (wc\[c\] \* dn\[c\] - factor \* xn\[c\])/rho * wc[c] * dn[c]/ | ops     |
rope: sign                   | ops/cpu.c  | s/s = (real)sign \* sine\[i\]/s = sine[i]/                        | ops         |
attention: dropped Δ         | ops/cpu.c  | s/p\[c\] \* (ds\[c\] - delta)/p[c] * ds[c]/                       | ops         |
attention: wrong head        | ops/cpu.c  | s/int kv = h \/ group \* d;/int kv = h % group * d;/         | attention   |
attention: sees the future   | ops/cpu.c  | s/return within(b.own + r + 1, b);/return b.keys;/ | attention   |
rmsnorm: no residual         | ops/cpu.c  | /if (residual.p)/d                                                | residual-copy |
swiglu: sign                 | ops/cpu.c  | s/(1 + g\[c\] \* (1 - sigma))/(1 - g[c] * (1 - sigma))/           | ops         |
cross-entropy: no label      | ops/cpu.c  | /z\[labels\[n\]\] -= (real)scale/d                                | ops         |
magnitude: half of dq        | ops/cpu.c  | s/(2 \* q \* root)/(4 * q * root)/                                | ops         |
broadcast: row for column    | ops/cpu.c  | s/gn\[rows ? 0 : c\]/gn[0]/                                       | ops         |
matmul: last rows            | ops/gemm.h | s/p->M - i < MR ? p->M - i : MR/MR/                                | matmul      |
matmul: b in place, stride   | ops/gemm.h | /^ *bk = p->b.ld;$/d                                              | matmul      |
matmul: a in place, part of K | ops/gemm.h |
    s/at(p->a, i, k0), p->a.ld/at(p->a, i, 0), p->a.ld/            | matmul      |
matmul: later parts of K     | ops/gemm.h | s/mode = k0 ? ADD : p->mode/mode = p->mode/                        | matmul      |
adamw: no correction         | ops/cpu.c  | s/root = (wide)sqrt(1 - pow(0.999, t))/root = 1/                  | adamw       |
modes: dxn of the MLP stays in | llama.h    |
    s/&L->q_proj, dxn, dq, own->xn, SET/\&L->q_proj, dxn, dq, own->xn, ADD/                                   | gradients   | bone
modes: up writes over gate   | llama.h    | s/dup, xn, ADD/dup, xn, SET/                                      | gradients   | bone
targets: x of the first tokens | llama.h    |
    s/gather(m, L->mid, m->x\[i\])/copy(L->mid, rows_of(m->x[i], 0, L->mid.rows))/                            | goldens     |
targets: att of the first tokens | llama.h    |
    s/gather(m, own->picked, L->att)/copy(own->picked, rows_of(L->att, 0, L->mid.rows))/                      | goldens     |
targets: att as the head left it | llama.h    |
    /^static void llama_backward/,/^}/{/gather(m, own->picked/d}                                              | gradients   | bone
targets: no gradient by way of x | llama.h    | s/scatter(m, m->dx, m->dlast)/zero(m->dx)/                | gradients   | bone
targets: others as they were | model.h    | /^static void scatter/,/^}/{/zero(dx)/d}                      | stale-memory | full
targets: LoRA keeps all rows | model.h    | s/by_target = is.reads .*/by_target = 0;/                     | gradients   | lora
targets: rwkv, no gradient of others | rwkv6.h | s/if (final) scatter(m, m->dx, m->dlast);//                 | gradients   | bone
targets: rwkv, dlerp of the first rows | rwkv6.h |
    s/if (final) scatter(m, own->dlerp, own->dpicked);/if (final) copy(rows_like(own->dlerp, dy), own->dpicked);/
    | gradients | bone
modes: dx always added       | adapters.h |
    s/matmul_nn(dx, dh, l->A, 1, mode)/matmul_nn(dx, dh, l->A, 1, ADD)/                                       | definition  | lora
modes: dx written twice      | adapters.h |
    /^static void lora_backward/,/^}/s/matmul_nn(dx, dy, l->W, 1, ADD)/matmul_nn(dx, dy, l->W, 1, mode)/      | definition  | lora
modes: dx always written     | ops/cpu.c  |
    s/dx.p \&\& mode == SET) copy(dx, dx_tilde)/dx.p) copy(dx, dx_tilde)/                                  | definition  | bat-row
modes: y written twice       | adapters.h |
    /^static void pissa_forward/,/^}/s/lora_forward(m, l, y, x, ADD)/lora_forward(m, l, y, x, mode)/         | definition  | pissa
modes: dk of the step before | ops/cpu.c  | /^    zero(dk);/d                                                | stale-memory | full
modes: swiglu adds           | ops/cpu.c  | s/dg\[c\] = d\[c\]/dg[c] += d[c]/                             | beyond-blocks | swiglu
rows: as narrow as the rank  | ops/mat.h  | s/return (cols + 7) \/ 8 \* 8;/return cols;/                        | aligned-rows |
overwrite, not accumulate    | adapters.h | s/matmul_tn(l->dA, dh, x, 1, ADD)/matmul_tn(l->dA, dh, x, 1, SET)/ | twice      |
beyond: attention, q of the first panel | ops/cpu.c  |
    s/panel_from(queries, q0, d), 1/queries, 1/                                                 | beyond-blocks | attention
beyond: attention, dq into the first block | ops/cpu.c  |
    s/panel_times(ROW(h->dq, q0 + i)/panel_times(ROW(h->dq, i)/                                        | beyond-blocks | attention
beyond: attention, lse of the first block | ops/cpu.c  |
    s/\*ROW(h->lse, q0 + r),/*ROW(h->lse, r),/                                                         | beyond-blocks | attention
beyond: attention, Δ of the first block | ops/cpu.c  |
    s/h->delta\[q0 + r\]/h->delta[r]/                                                                  | beyond-blocks | attention
beyond: attention, a last block of one row | ops/cpu.c  |
    /^static void attention_backward_head/,/^}/s/q0 < q.rows \&\&/q0 + 1 < q.rows \&\&/                | beyond-blocks | attention
beyond: attention, wrong from the second block | ops/cpu.c  |
    s/h->delta\[q0 + r\]/(q0 ? 0 : h->delta[q0 + r])/                                                  | beyond-rows | lora
beyond: attention, keys of the first block | ops/cpu.c  |
    s/turned_slivers(9, rows_of(h.k, first,/turned_slivers(9, rows_of(h.k, 0,/                         | beyond-blocks | attention
beyond: attention, out into the first panel | ops/cpu.c  |
    s/panel_times(ROW(out, q0), out.ld/panel_times(ROW(out, 0), out.ld/                                | beyond-blocks | attention
beyond: attention, keys before the first block | ops/cpu.c  |
    s/int own = k.rows - q.rows - first;/int own = k.rows - q.rows;/                                   | beyond-blocks | attention
beyond: attention, out as the blocks before left it | ops/cpu.c  |
    s/o\[c\] \*= shrinks;/o[c] *= 1;/                                                                  | beyond-blocks | attention
beyond: attention, the sum of the last block alone | ops/cpu.c  |
    s/\*sum = \*sum \* shrinks + total;/*sum = total;/                                                 | beyond-blocks | attention
beyond: attention, one query too few for dk and dv | ops/cpu.c  |
    s/b.own < c ? c - b.own : 0)/b.own < c ? c - b.own + 2 : 0)/                                       | beyond-blocks | attention
beyond: attention, values of the first key | ops/cpu.c  |
    s/columns_from(h->v_turned, begin)/columns_from(h->v_turned, 0)/                                   | beyond-blocks | attention
beyond: attention, wide heads | ops/gemm.h |
    s/(size_t)width, m, first, k,$/(size_t)width, m, first, 0,/                           | beyond-blocks | attention
beyond: product, first part of K copied | ops/gemm.h |
    s/steps_along(m, first + i, k0, K/steps_along(m, first + i, 0, K/                                         | beyond-panels |
beyond: product, first part of K copied across | ops/gemm.h |
    s/step_across(m, k0 + k, k0 + K/step_across(m, k, K/                                                      | beyond-panels |
beyond: product, first part of K of b | ops/gemm.h |
    s/sliver = (real \*)at(p->b, k0, j)/sliver = (real *)at(p->b, 0, j)/                                      | beyond-panels |
beyond: product, first part of K of a across | ops/gemm.h |
    s/at(p->a, k0, i), 1, p->a.ld/at(p->a, 0, i), 1, p->a.ld/                                                 | beyond-panels |
beyond: product, into the first NC columns | ops/gemm.h | s/gemm_tile(p, i, n0 + s \* NR/gemm_tile(p, i, s * NR/ | beyond-panels |
beyond: product, panels copied on the first | ops/gemm.h |
    s/i0 += PANEL_RUN, panels += PANEL_RUN/i0 += PANEL_RUN, panels += 0 * PANEL_RUN/                         | beyond-panels |
beyond: product, slivers of the first NC columns | ops/gemm.h | s/p->b, n0 + j, k0/p->b, j, k0/ | beyond-panels |
beyond: product, last sliver of later NC columns | ops/gemm.h |
    s/sliver_in_place(p, n0 + j)) j/sliver_in_place(p, j)) j/                                                 | beyond-panels |
beyond: product, panels of the first block | ops/gemm.h | s/packed != block/packed < 0/                       | beyond-panels |
beyond: product, many blocks times many rows | ops/gemm.h |
    s/(int)((long)ceil_div(p->M, MR)/(int)(ceil_div(p->M, MR)/                                                | beyond-chunks |
beyond: product, rows of the first block | ops/gemm.h | s/int i0 = first_row(p, block)/int i0 = 0/             | beyond-panels |
beyond: product, slivers for two threads | ops/gemm.h |
    s/s < slivers \* (part + 1) \/ p->parts/s < slivers \/ p->parts * (part + 1)/                             | beyond-panels |
beyond: product, tasks for two threads | ops/gemm.h |
    s/long task = tasks \* thread \/ threads/long task = 0/                                                   | beyond-panels |
beyond: product, transposed and not added | ops/gemm.h | /p = (product){/,/};/s/\.mode = mode/.mode = SET/ | beyond-panels |
beyond: product, blocks beside each other | ops/cpu.c  |
    s/offset(m, (size_t)i \* m.stride)/offset(m, (size_t)i * (size_t)m.rows * m.ld)/                          | beyond-panels |
beyond: product, one weight for all | ops/cpu.c  | s/if (m.batch > 1) m = offset/m = offset/                  | beyond-panels |
beyond: embedding, first 32 columns | ops/cpu.c  | s/c < dout.cols \&\& c < c0 + 32; c++/c < 32; c++/  | beyond-blocks | embedding
beyond: rope, first 1000 positions | ops/cpu.c  | s/ROW(table, pos\[n\])/ROW(table, pos[n] % 1000)/         | beyond-blocks | rope
beyond: shard sum, short last shard | ops/cpu.c  |
    s/sn\[c\] += xn\[j + c\]/sn[c] += part == r ? xn[j + c] : 0/                                       | beyond-blocks | shard_sum
beyond: shard tile, short last shard | ops/cpu.c  |
    s/xn\[j + c\] += sn\[c\]/xn[j + c] += part == r ? sn[c] : 0/                                      | beyond-blocks | shard_tile
beyond: row dots, first KC numbers | ops/cpu.c  |
    s/\*v = widened(at(y, n, c), y.type/*v = widened(at(y, n, 0), y.type/                              | beyond-blocks | broadcast
beyond: column dots, first 64 columns | ops/cpu.c  |
    s/(double)ROW(y, n)\[c0 + j\]/(double)ROW(y, n)[j]/                                                | beyond-blocks | broadcast
beyond: column dots, sums of the first 64 | ops/cpu.c  |
    s/ROW(g, 0)\[c0 + j\] = (mode/ROW(g, 0)[j] = (mode/                                                | beyond-blocks | broadcast
beyond: copy, first KC numbers | ops/cpu.c  | s/y.type, widened(at(from, n, c)/y.type, widened(at(from, n, 0)/ | beyond-buffers |
beyond: copy, first of a batch | ops/cpu.c  |
    s/mat to = nth(y, b), from = nth(x, b);/mat to = nth(y, b), from = nth(x, 0);/                            | beyond-buffers |
beyond: zero, first of a batch | ops/cpu.c  | s/memset(ROW(nth(x, n \/ x.rows)/memset(ROW(nth(x, 0)/          | beyond-buffers |
beyond: norm, last piece     | ops/cpu.c  |
    s/pieces = (n + PIECE - 1) \/ PIECE/pieces = n < PIECE ? 1 : n \/ PIECE/                                  | beyond-buffers |
beyond: norm, start of later pieces | ops/cpu.c  |
    s/for (size_t j = i \* PIECE; j < end/for (size_t j = i * PIECE + (i > 0); j < end/                       | beyond-buffers |
beyond: tiled identity, lying | ops/cpu.c  | s/int r = e.rows < e.cols ? e.rows : e.cols/int r = e.cols/      | beyond-buffers |
beyond: head, labels of the first chunk | model.h    |
    s/m->logits, m->label + i, scale/m->logits, m->label, scale/                                              | beyond-chunks |
beyond: head, rows of the first chunk | model.h    |
    s/head_forward(m, i, n)/head_forward(m, 0, n)/                                                            | beyond-chunks |
beyond: head, dlast of the first chunk | model.h    | s/rows_of(m->dlast, i, n)/rows_of(m->dlast, 0, n)/      | beyond-chunks |
beyond: head, losses of the first chunk | model.h    | s/rows_of(m->losses, i, n)/rows_of(m->losses, 0, n)/   | beyond-chunks |
beyond: head, short last chunk | model.h    |
    s/i < b->targets; i += m->chunk/i + m->chunk <= b->targets; i += m->chunk/                                | beyond-chunks |
beyond: head, dhn of the chunk before | model.h    |
    s/matmul_nn(m->dhn, m->logits, m->head, 1, SET)/matmul_nn(m->dhn, m->logits, m->head, 1, ADD)/            | beyond-chunks |
beyond: head, dlast of the step before | model.h    | /zero(m->dlast);/d                                       | stale-memory |
beyond: head, dhead of the last chunk | model.h    |
    s/matmul_tn(m->dhead, m->logits, m->hn, 1, ADD)/matmul_tn(m->dhead, m->logits, m->hn, 1, SET)/            | beyond-chunks |
beyond: head, 16 rows at least | model.h    | s/chunk = chunk < 16 ? 16 : chunk/chunk = chunk < 1 ? 1 : chunk/ | beyond-chunks |
beyond: answers, rows of the first chunk | run/generate.h |
    s/head_forward(m, i, b->rows/head_forward(m, 0, b->rows/                                                   | together    |
beyond: answers, logits of the first chunk | run/generate.h | s/if (i % m->chunk == 0) {/if (i == 0) {/       | together    |
GPU reduction: no barrier before | train.cu   | /__syncthreads.*may still be read/d                        | gpu-ops     | reverse
GPU reduction: no barrier within | train.cu   | /= x;$/{n;s/__syncthreads();//}                            | gpu-ops     | forward
GPU column sum: no barrier   | train.cu   | /of_warp\[warp\]\[lane\] = sum/{n;s/__syncthreads();//}       | gpu-ops     | random:1
GPU embedding: the last of an id, not the next | train.cu | s/i > n \&\& i < next) next = i/i > n) next = i/ | gpu-ops | forward
GPU embedding: every token adds | train.cu   | s/if (!links\[first\].is_first) return;//                   | gpu-ops     | forward
GPU embedding: only the first token of an id | train.cu | s/n = links\[n\].next) {/n = dout.rows) {/       | gpu-ops     | forward
GPU batch stride             | train.cu   | s/b \* m.stride : 0) + row/b * m.rows * m.ld : 0) + row/       | gpu-ops     | forward
GPU leading dimension        | train.cu   | s/(int)b.ld, b.batch/b.cols, b.batch/                          | gpu-ops     | forward
GPU column tail              | train.cu   |
    s/(cols + WARP \* PACK - 1) \/ (WARP \* PACK)/(cols + WARP * PACK - 2) \/ (WARP * PACK)/               | gpu-ops     | forward
GPU pack: one element too few | train.cu   |
    s/if (i < n) down(&p\[i\], a.x\[i\]);/if (i + 1 < n) down(\&p[i], a.x[i]);/                            | gpu-ops     | forward
GPU pack: whole beyond the row | train.cu   | s/return n >= PACK \&\& /return n > 0 \&\& /                 | gpu-ops     | forward
GPU rows beyond the grid     | train.cu   | s/n < s.rows; n += gridDim.y \* WARPS/n < s.rows; n += s.rows/ | gpu-ops     | forward
GPU warp tail                | train.cu   |
    s/(x.cols + WARP - 1) \/ WARP, THREADS, g/x.cols \/ WARP, THREADS, g/                                  | gpu-ops     | forward
GPU product: not added       | train.cu   | s/beta = mode == ADD ? 1 : 0/beta = 0/                         | gpu-ops     | forward
GPU product: stride of one weight for all | train.cu   |
    s/b.batch > 1 ? (long long)b.stride : 0/(long long)b.stride/                                           | gpu-ops     | forward
GPU attention: sees the future | train.cu   |
    s/return (unsigned)behind < (unsigned)window/return behind >= -1 \&\& behind < window/                 | gpu-ops     | forward
GPU attention: future of a tile | train.cu | s/return key + keys - 1 <= own/return key + keys - 2 <= own/ | gpu-ops | forward
GPU attention: a tile beyond the window | train.cu | s/own - window + 1 : b.s.k/own - window + 2 : b.s.k/ | gpu-ops | forward
GPU attention: dropped Δ     | train.cu   | s/x.x \* (y.x - Delta\[j % 2\])/x.x * y.x/                    | gpu-ops     | forward
GPU attention: dropped Δ of keys | train.cu   | s/x.x \* (y.x - D0\[0\])/x.x * y.x/                        | gpu-ops     | forward
GPU attention: wrong head of a group | train.cu   |
    s/head = blockIdx.y, kv = head \/ (q.cols \/ k.cols)/head = blockIdx.y, kv = head % (k.cols \/ d)/     | gpu-ops     | forward
GPU attention: one head of a group | train.cu   | s/steps = tiles \* sharing;/steps = tiles;/              | gpu-ops     | forward
GPU attention: out keeps its old m | train.cu   |
    s/o\[n\]\[j\] = {o\[n\]\[j\].x \* shrink/o[n][j] = {o[n][j].x/                                         | gpu-ops     | forward
GPU attention: l keeps its old m | train.cu   | s/sum\[j\] \*= shrink;//                                   | gpu-ops     | forward
GPU attention: does not wait | train.cu   | s/_wait_prior(LATER);/_wait_prior(LATER + 1);/ | gpu-ops     | forward
GPU attention: no barrier  | train.cu   | /static inline void arrived/,/^}/{/meet</d}         | gpu-ops  | random:1
GPU attention: over the tile in use | train.cu | s/SLOTS = GROUPS + 1/SLOTS = 1/                   | gpu-ops  | reverse
GPU attention: over the second group | train.cu | s/SLOTS = GROUPS + 1/SLOTS = GROUPS/                  | gpu-ops  | reverse bf16
GPU attention: values of another tile | train.cu | s/ add_values(i - 1);/ add_values(i);/ | gpu-ops  | forward bf16
GPU attention: keys of another tile | train.cu | s/ add_keys(i - 1);/ add_keys(i);/       | gpu-ops  | forward bf16
GPU attention: queries of another tile | train.cu | s/ add_queries(i - 1);/ add_queries(i);/ | gpu-ops | forward bf16
GPU attention: no last values | train.cu | s/ add_values(tiles - 1);//                    | gpu-ops  | forward bf16
GPU attention: no last keys  | train.cu | s/ add_keys(tiles - 1);//                       | gpu-ops  | forward bf16
GPU attention: no last queries | train.cu | s/ add_queries(steps - 1);//                  | gpu-ops  | forward bf16
GPU attention: exp before the scores are there | train.cu | s/^        finished<0>(S);// | gpu-ops   | forward bf16
GPU attention: P v still on its way | train.cu | s/finished<1>(o)/finished<2>(o)/         | gpu-ops  | forward bf16
GPU attention: dS k still on its way | train.cu | s/finished<2>(sum);/finished<3>(sum);/  | gpu-ops  | forward bf16
GPU attention: Pᵀ dout still on its way | train.cu | s/finished<2>(sum_/finished<4>(sum_/ | gpu-ops  | forward bf16
GPU attention: out before P v is there | train.cu | s/^        finished<0>(o);//              | gpu-ops  | forward bf16
GPU attention: Delta of the first packs | train.cu | s/(lane % 4 + 4 \* p) \* PACK/lane % 4 * PACK/ | gpu-ops | forward bf16
GPU attention: Delta of one row  | train.cu | s/load_packed(&o\[i\]\[p\]/load_packed(\&o[0][p]/ | gpu-ops | forward bf16
GPU attention: rows in a tile    | train.cu | s/at + r \* 64, from/at + r * 32, from/         | gpu-ops  | forward bf16
GPU large product: before it     | train.cu | s/&beta, y.p, &p.y, y.p/\&alpha, y.p, \&p.y, y.p/ | gpu-ops | forward bf16
GPU large product: rows of y     | train.cu | s/y.cols, y.rows, y.ld)/y.cols, y.rows, y.cols)/ | gpu-ops | forward bf16
GPU large product: rows of a     | train.cu | s/y.rows : K, a.ld), what/y.rows : K, K), what/ | gpu-ops | forward bf16
GPU large product: the kernel of another | train.cu | s/!memcmp(&k.of, p, sizeof \*p)/k.offered/ | gpu-ops | forward bf16
GPU large product: begins anywhere | train.cu | s/(uintptr_t)b.p) % 256 == 0/(uintptr_t)b.p) % 2 == 0/ | gpu-ops | forward bf16
GPU bat-row: own square first | train.cu  |
    s/(own \/ SQUARE + 1 + step % across)/(own \/ SQUARE + step % across)/                                 | gpu-ops     | forward
GPU bat-row: rank of a square | train.cu  |
    s/return r - first < SQUARE ? r - first : SQUARE;/return SQUARE;/                                      | gpu-ops     | forward
GPU bat-row: u of the last square alone | train.cu |
    s/^        add_pairs(u, part);/        memcpy(u, part, sizeof u);/                                     | gpu-ops     | forward
GPU bat-row: u is kept       | train.cu   | s/u\[n\]\[0\] = u\[n\]\[1\] = {0, 0};/;/                   | gpu-ops     | forward
GPU bat-row: du without g    | train.cu   | s/= {up(a.x) + up(b.x), up(a.y) + up(b.y)}/= {up(a.x), up(a.y)}/ | gpu-ops | forward
GPU bat-row: g over the one in use | train.cu | s/return s.across == 1 ? 0 : step % ROOMS;/return 0;/     | gpu-ops     | reverse
GPU bat-row: dB without g    | train.cu   | s/mma(c\[k \/ 8\], v, y);//                                | gpu-ops     | forward
GPU bat-row: dx written, not added | train.cu | s/if (mode == ADD) before = load_pack(to, cols - c);//     | gpu-ops     | forward
GPU bat-row: a pack beyond the square | train.cu |
    s/store_pack(to, sum, cols - c);/store_pack(to, sum, PACK);/                                           | gpu-ops     | forward
GPU bat-row: one slice alone | train.cu   |
    s/for (int s = 0; s < slices; s++) sum += sums/for (int s = 0; s < 1; s++) sum += sums/               | gpu-ops     | forward
GPU bat-row: parts overlap   | train.cu   |
    s/return blockIdx.z \* part(count);/return blockIdx.z * part(count) \/ 2;/                            | gpu-ops     | forward
GPU bat-row: no sum of the rows | train.cu |
    s/leave_sum(sums, r, rows - warp_row, s.width/leave_sum(sums, r, rows, s.width/                       | gpu-ops     | forward
GPU bat-row: does not wait   | train.cu   | s/arrived<AHEAD - 1>();/arrived<AHEAD>();/                 | gpu-ops     | forward
GPU tile: rows of one panel  | ops/tensor_core.cuh | s/col \/ 64 \* ROWS \* 64 +/col \/ 64 * 64 +/ | gpu-ops | forward
GPU cross-entropy: no label  | train.cu   | s/ - (c + i == label)//                                        | gpu-ops     | forward
GPU cross-entropy: sum not corrected | train.cu   | s/sum \*= exp(before - mine)/sum \*= 1/                | gpu-ops     | forward
GPU cross-entropy: beyond the row | train.cu   | s/if (c + i < logits.cols) sum += /sum += /               | gpu-ops     | forward
GPU rope: the other way round | train.cu   | s/u.x\[k\] \* c.x\[k\] - sign/u.x[k] * c.x[k] + sign/         | gpu-ops     | forward
GPU rope: packs across halves | train.cu   | /void rope_kernel/,/^}/s/half - i/PACK/g                      | gpu-ops     | forward
GPU shard sum: last shard    | train.cu   |
    s/load_pack(row_of(x, n) + i, x.cols - i)/load_pack(row_of(x, n) + i, r - c)/                          | gpu-ops     | forward
GPU shard sum: shards abreast left out | train.cu   |
    s/for (int j = 1; j < abreast/for (int j = 2; j < abreast/                                             | gpu-ops     | forward
GPU shard sum: no barrier before | train.cu   | /of_thread\[threadIdx.x\] = sum/{n;s/__syncwarp();//}      | gpu-ops     | forward
GPU shard sum: no barrier behind | train.cu   | /store_reals(s, n, c, sum)/{n;s/__syncwarp();//}          | gpu-ops     | random:1
GPU shard tile: beyond the row | train.cu   | s/x.cols - col < r - c ? x.cols - col : r - c/r - c/      | gpu-ops | forward
GPU rmsnorm: no residual     | train.cu   | s/if (residual.p) store_reals(residual, n, c, kept\[k\]);//    | gpu-ops     | forward
GPU rmsnorm: parts not read again | train.cu   | /void rmsnorm_kernel/,/^}/s/if (first < last_part(C))/if (0)/ | gpu-ops | forward
GPU rmsnorm backward: parts not read again | train.cu   |
    s/if (first < last_part(C)) kept.load/if (0) kept.load/                                                | gpu-ops     | forward
GPU norm: a stride too short | train.cu   |
    s/i += (size_t)gridDim.x \* THREADS \* PACK/i += (size_t)gridDim.x * (THREADS - 1) * PACK/             | gpu-ops     | forward
GPU layernorm: mean of g left out | train.cu | s/part.g\[k\].x\[i\] - part.mean_g - /part.g[k].x[i] - / | gpu-ops | forward
GPU layernorm: beyond the part | train.cu | s/c + i < end ? up(x\[k\].x\[i\]) - mean : 0/up(x[k].x[i]) - mean/ | gpu-ops | forward
GPU layernorm: the first stretch for all | train.cu | s/if (from == held) return;/if (held >= 0) return;/ | gpu-ops | forward
GPU layernorm: parts that are not there | train.cu | s/end = there ? size : 0/end = size/ | gpu-ops | forward
GPU layernorm: no barrier within | train.cu | /of_warp\[1\]\[threadIdx/{n;n;s/__syncthreads();//} | gpu-ops | forward
GPU wkv: sign of what is read | train.cu | s/p = q + t.r\[i\] \* t.Sdy/p = q - t.r[i] * t.Sdy/ | gpu-ops | forward
GPU wkv: what is written left in p | train.cu | s/p - t.k\[i\] \* dSv : 0/p : 0/ | gpu-ops | forward
GPU wkv: nothing blown up | train.cu | s/1 + t.e\[i\] > 1 ? p - t.k\[i\] \* dSv : 0/p - t.k[i] * dSv/ | gpu-ops | forward
GPU wkv: the same tokens again | train.cu | s/fetch(first + FETCHED);/fetch(first);/ | gpu-ops | forward
GPU wkv: the last of those fetched | train.cu |
    s/i < FETCHED \&\& first + i < s.nq/i < FETCHED - 1 \&\& first + i < s.nq/ | gpu-ops | forward
GPU wkv: last token of a text | train.cu | s/m < s.nq ? d - c : 0/m < s.nq - 1 ? d - c : 0/ | gpu-ops | forward
GPU wkv: channels of the next head | train.cu | s/m < s.nq ? d - c : 0/m < s.nq ? D - c : 0/ | gpu-ops | forward
GPU wkv: no barrier behind the fetched | train.cu | /next\[f\].put/{n;s/__syncthreads();//} | gpu-ops | forward
GPU wkv: no barrier behind the sums | train.cu | /__syncthreads.*what others wrote/d | gpu-ops | forward
GPU wkv: sums of another line | train.cu | s/upper ? sum\[0\] : sum\[2\], 2/upper ? sum[1] : sum[2], 2/ | gpu-ops | forward
GPU wkv: no state at first | train.cu | s/if (s.nk > s.nq)$/if (0)/ | gpu-ops | forward
GPU reserve: no sums of a recurrence | train.cu |
    s/if (n.train) bytes\[RECURRENT\] = /if (0) bytes[RECURRENT] = / | gpu-allocations | forward
GPU reserve: nothing         | train.cu   | s/if (take) resize/if (0) resize/                          | gpu-allocations | forward
GPU reserve: no factors      | train.cu   | /bytes\[FACTOR_[AB]\] = /d                                 | gpu-allocations | forward
GPU reserve: no backward     | train.cu   | s/if (n.train) {/if (0) {/                                 | gpu-allocations | forward
GPU reserve: fewer blocks    | train.cu   |
    s/bytes\[BLOCKS\] = 2 \* (size_t)n.tokens/bytes[BLOCKS] = (size_t)n.tokens \/ 64/       | gpu-allocations | forward
GPU magnitude: 0/0           | train.cu   | s/squares\[i\] <= 0 ? 1 : m\[i\]/m[i]/                         | gpu-ops     | forward
GPU magnitude: 0/0 in its gradient | train.cu   | s/bool none = q <= 0;/bool none = false;/                | gpu-ops     | forward
GPU sum of squares: a block left out | train.cu | s/sums + SUMS, sums, blocks)/sums + SUMS, sums, blocks - 1)/ | gpu-ops | forward
GPU AdamW: no decay          | train.cu   | s/W.x\[k\] \* shrink/W.x[k]/                                   | gpu-ops     | forward
json: equal keys             | lib/json.h | s/ . JSON_REJECT_DUPLICATES//                                        | row-files   |
json: large whole numbers    | lib/json.h | s/AS_DOUBLES = JSON_DECODE_INT_AS_REAL/AS_DOUBLES = 0/            | json-values |
json: the place of a fault   | lib/json.h | /json_error_code(&e) != json_error_premature/d                    | row-files   |
json: a colon in a text      | lib/json.h | /^static const char .next_value/,/^}/{/at = string_end/d}         | row-files   |
json: a colon further inside | lib/json.h | /depth += \*at == .{./d                                           | row-files   |
json: an escaped quote       | lib/json.h | s/ ? 2 : 1;/ ? 1 : 1;/                                            | row-files   |
json: 15 digits              | lib/json.h | s/ == x ? 15 : 17/ == x ? 15 : 15/                                | json-values |
json: 17 digits              | lib/json.h | s/ == x ? 15 : 17/ == x ? 17 : 17/                                | json-values |
json: a name of any bytes    | lib/json.h | s/char .shown = json ? NULL : printable(text, "")/char *shown = NULL/ | json-values |
json: another dtype beside   | lib/directory.h | s/if (!json_object_get(json, "torch_dtype") && .*{$/if (1) {/ | config-spelling |
json: numbers of a row       | run/rows.h | s/json_stringn(at, n)/json_string("0")/                           | row-files   |
safetensors: -0              | lib/safetensors.h | /die("%s: -0 is no size/d                                | safetensors |
safetensors: any depth       | lib/safetensors.h | s/depth > 127/depth > 128/                                 | safetensors |
safetensors: 8.0             | lib/safetensors.h |
    s/return json_is_integer(item) &&/return json_is_number(item) \&\&/                                       | safetensors |
rows: any byte               | run/rows.h | /^    expect_utf8(path, \*whole, \*bytes);$/d                     | row-files   |
rows: answers of nothing     | run/rows.h | s/if (!r.ids) { d->empty++; return; }/if (!r.ids) return;/        | row-files   |
safetensors: shared bytes    | lib/safetensors.h | /^        if (s->from < end)$/,+1d                         | safetensors |
safetensors: holes           | lib/safetensors.h | /^        if (s->from > end)$/,+1d                         | safetensors |
safetensors: bytes behind    | lib/safetensors.h | /stand behind the last tensor/d                            | safetensors |
safetensors: a cut file      | lib/safetensors.h | /^    sigaction(SIGBUS/d                                   | cut-file    |
printable: C1                | ops/host.h | s/if (n && !c0 && !c1 && !turns)/if (n \&\& !c0 \&\& !turns)/    | safetensors |
lora+: λ for A               | adapters.h | s/\.value == &l->B) m->tensors/.value == \&l->A) m->tensors/      | update      |
lora+: λ for neither         | train.c    | s/lr \* rate, opt.weight_decay/lr, opt.weight_decay/               | update      |
update: no decay             | train.c    | s/lr \* rate, opt.weight_decay/lr * rate, 0/                       | update      |
update: the norm without ε   | train.c    | s/opt.clip \/ (norm + 1e-6) : 1;/opt.clip \/ norm : 1;/           | update      |
update: clipped upwards      | train.c    | s/ && opt.clip \/ (norm + 1e-6) < 1 ?/ ?/                         | update      |
lora: half of the start      | adapters.h | s/(2 \* rng_uniform(&r) - 1)/(rng_uniform(\&r) - 0.5)/            | lora-start  |
lora: one start for all      | adapters.h |
    /^static void lora_init/,/^}/s/rng_named(m->p.seed, name)/rng_named(m->p.seed, "A")/                      | lora-start  |
saved: α of rank r           | run/peft.h | s/p->alpha \* doubled/p->alpha/                                    | saved-lora  |
saved: + B0                  | lib/safetensors.h | s/= -y\[/= y[/                                           | saved-lora  |
saved: without rslora        | run/peft.h | s/same_text(p->method->peft_variant, lora_flags\[i\])/0/          | saved-lora  |
step: mean of means          | train.c    | s/fill_batch(r, b, i, last);$/&scale = 1.0 \/ b->targets;/         | targets     |
step: prompts count          | train.c    | s/targets += learnt_tokens(of_step)/targets += of_step->n - 1/    | targets     |
batch: prompts learnt        | run/rows.h | s/if (is_learnt(r, i + 1)) b->target_row/if (1) b->target_row/     | targets     |
batch: answers from the second | run/rows.h |
    s/if (is_learnt(r, i + 1)) b->target_row/if (is_learnt(r, i)) b->target_row/                              | targets     |
schedule: linear             | train.c    | s/return opt.lr \* left;/return opt.lr * (1 - left);/             | schedules   |
schedule: constant falls     | train.c    |
    /^static double learning_rate/,/^}/s/return opt.lr;/return opt.lr * left;/                                | schedules   |
schedule: warm-up from 1     | train.c    |
    s/return opt.lr \* s \/ opt.warmup/return opt.lr * (s + 1) \/ opt.warmup/                                 | schedules   |
schedule: steps after warm-up | train.c   | s/? steps - opt.warmup : 1/? steps : 1/                            | schedules   |
windows: a token lost        | run/rows.h | s/i + 1 < all.n; i += seq/i + 1 < all.n; i += seq + 1/             | windows     |
windows: first token learnt  | run/rows.h | s/, .prompt = 1};/, .prompt = 0};/                                 | windows     |
rows: nothing of the answer  | run/rows.h | s/if (r.n > r.prompt) { arrput/if (r.n >= r.prompt) { arrput/      | cut-rows    |
rows: cuts not counted       | run/rows.h | s/r.n = seq, d->cut++/r.n = seq/                                   | cut-rows    |
saving: NaN                  | run/checkpoint.h |
    s/kind == PARAM \&\& !isfinite(sum_of_squares(\*m->/kind == BASE \&\& !isfinite(sum_of_squares(*m->/      | nan-saved   |
resume: another decay        | run/options.h | /"--weight-decay"/s/SAME/ANY/                                  | same-options |
resume: another ratio        | run/options.h | /"--lora-plus-ratio"/s/SAME/ANY/                               | same-options |
tensors too many             | lib/safetensors.h | s/if (shgeti(names, c->tensors\[i\].key) < 0 \&\&/if (0 \&\&/ | too-many    |
config: another ε            | llama.h      | s/TO(eps),        1e-6,/TO(eps),        1e-5,/                     | defaults    |
config: another α            | run/peft.h | s/"lora_alpha", 8/"lora_alpha", 16/                                | defaults    |
words: of one length, one word | tokenizer.c |
    s/k->bytes == word.n \&\& !memcmp(k->text, word.p, word.n)/k->bytes == word.n/                            | known-words |
words: more ids kept than fit | tokenizer.c | s/if (count > KNOWN_IDS)/if (0)/                                | known-words |
words: those of the word before | tokenizer.c | s/memcpy(k->ids, e->ids + first,/memcpy(k->ids, e->ids,/          | known-words |
pieces: USER merges          | tokenizer.c | s/return id < 0 .. e->t->pieces\[id\].type != USER/return 1/       | pieces      |
pieces: UNUSED is said       | tokenizer.c | s/== UNUSED) e->left_part/== NORMAL) e->left_part/                | pieces      |
lora: a number beyond the end | adapters.h | /^static void lora_init/,/^}/s/i < n; i++) a/i <= n; i++) a/    | block-ends  | lora
pieces: no room for a longer word | tokenizer.c | s/: 2 \* e->room;/: 1 * e->room;/                           | block-ends  | lora
pieces: spaces kept          | tokenizer.c | s/while (after_space \&\& part.n/while (0 \&\& part.n/            | pieces      |
pieces: a last space kept    | tokenizer.c | s/while (t->trim_spaces \&\& (size_t)/while (0 \&\& (size_t)/     | pieces      |
pieces: surrogates           | ops/utf8.h | s/(code < 0xd800 .. code > 0xdfff)/1/                              | pieces      |
pieces: overlong             | ops/utf8.h | s/code >= lowest\[n\]/1/                                           | pieces      |
added: the first of two      | tokenizer.c | s/(t->added\[i\].text.n != n/(1/                                  | added-twice |
added: rstrip beyond the text | tokenizer.c | s/is_space(code_behind(text, start))/is_space(text.p[start])/       | added-twice |
pieces: a field of number 0  | tokenizer.c | s/f->key >> 3 == 0/0/                                          | refused-tokenizers |
pieces: an empty one         | tokenizer.c | s/if (!p->text.n /if (0 /                                      | refused-tokenizers |
top-p: too few are sorted    | run/generate.h | s/> least) c\[likely++\]/> least * vocab) c[likely++]/        | sampling    |
top-p: one more on the edge  | run/generate.h | s/reached < opt.top_p \* sum/reached <= opt.top_p * sum/       | sampling    |
greedy: the last of equals   | run/generate.h | s/logits\[i\] > logits\[best\]/logits[i] >= logits[best]/      | sampling    |
product: copies abreast, the first again | ops/gemm.h | s/step + s \* width, (size_t)width/step, (size_t)width/  | beyond-panels |
product: the rest beside the first | ops/gemm.h |
    s/memcpy(out + (size_t)whole \* size, step/memcpy(out, step/                                             | beyond-panels |
product: half a tile for a whole one | ops/gemm.h | s/int both = out->cols > LANES/int both = out->cols > NR/ | beyond-panels |
panels: columns beyond the last | ops/gemm.h | s/out.cols = cols - j < NR ?/out.cols = cols + j < NR ?/ | beyond-panels |
product: a whole tile at the last rows | ops/gemm.h | s/if (out->rows == MR \&\& /if (/ | beyond-panels |
product: a tile beside its place | ops/gemm.h | s/ \&\& out->col == 1) store_whole/) store_whole/ | beyond-panels |
product: a whole vector at the edge | ops/gemm.h |
    s/out->cols == vectors \* LANES/out->cols <= vectors * LANES/   | beyond-panels |
pairs: the first number twice | ops/gemm.h | s/line, line + 1, 2/line, line, 2/                                | pairs       |
pairs: a row beyond an odd K  | ops/gemm.h | s/if (k + 1 < end) b =/if (1) b =/                               | pairs       |
bf16: before the start        | train.c    |
    /^static void fill_model/,/^}/s/^    model_allocate(m);/    if (opt.bf16) dev_bf16(1);\n&/ | bf16 | pissa
pairs: b as numbers           | ops/gemm.h | s/if (a_pairs == b_pairs)/if (1)/                                | pairs       |
pairs: attention, the key behind an odd number | ops/cpu.c | s/c <= to; c++) s/c < to; c++) s/                 | attention-pairs |
pairs: attention, the row behind an odd number | ops/cpu.c |
    s/r + 1 < rows ? s + (r + 1) \* WIDE + from : none/s + (r + 1) * WIDE + from/                             | attention-pairs |
pairs: attention, rows of the panel before | ops/cpu.c | s/h->P_down + i \/ 2 \* WIDE/h->P_down/            | attention-pairs |
pairs: attention, from an odd row on | ops/cpu.c |
    s/int r = (b.own < c ? c - b.own : 0) \/ 2 \* 2;/int r = b.own < c ? c - b.own : 0;/                      | attention-pairs |
pairs: attention, dq of numbers | ops/cpu.c | s/pair_keys(dS + r \* WIDE + begin, cols)/(void)cols/           | attention-pairs |
pairs: attention, wide heads at once | ops/gemm.h | s/m, j, j + SLIVER_RUN, 0/m, j, m.cols, 0/                 | attention-pairs |
pairs: attention, steps of numbers | ops/gemm.h |
    s/{b.p + (size_t)steps(k, bf16_pairs)/{b.p + (size_t)k/       | attention-pairs |
pairs: of the weight alone    | ops/gemm.h | s/M, 2 \* k + 1, odds/M, 2 * k, odds/                             | pairs       |
few rows: dealt once too few | ops/gemm.h | s/^    deal(m, 1);//                                                   | few-rows    |
few rows: the last part of K | ops/gemm.h | s/k0 += part, mode = ADD/k0 += part/                                | few-rows    |
few rows: the last square twice | ops/gemm.h | s/M, first, k - first, to/M, first, 0, to/                       | few-rows    |
few rows: one after the other | ops/gemm.h | s/line\[half \* LANES + l\] + k/line[l] + k/                     | few-rows    |
window: one key less         | ops/cpu.c  |
    s/within(b.own + r + 1 - b.window, b)/within(b.own + r + 2 - b.window, b)/                         | beyond-blocks | attention
window: a row sees one more  | ops/cpu.c  |
    s/within(b.own + r + 1 - b.window, b)/within(b.own + r - b.window, b)/                             | beyond-blocks | attention
window: unseen keys learn    | ops/cpu.c  | /hide_unseen(ds, b, r, from, to);/d                               | ops         |
window: from one layer later | llama.h    | s/i < c->full_layers/i <= c->full_layers/                     | goldens     |
bias: no gradient            | model.h    | /bias_backward(l->dbias, dy);/d                                   | gradients   | full
bias: the last token alone   | ops/cpu.c  | /^void bias_backward/,/^}/s/ += ROW(dy/ = ROW(dy/                 | ops         |
qwen3: k by the norm of q    | llama.h    | s/L->k_raw), L->k_norm/L->k_raw), L->q_norm/                      | goldens     |
qwen3: k without its norm    | llama.h    | s/rmsnorm_forward(heads_of(m, L->k), none.*/copy(L->k, L->k_raw);/ | goldens    |
qwen3: no gradient of k      | llama.h    | /rmsnorm_backward(heads_of(m, dk)/,+1d                            | gradients   | full
llama3: fast or slow, no blend | llama.h  | s/often = fmin(fmax(often, 0), 1);/often = often > 0;/            | goldens     |
llama3: turns in radians     | llama.h    | s/ \/ (2 \* acos(-1));/;/                                         | goldens     |
linear: as it was            | llama.h    | s/== ROPE_LINEAR) often = 0/== ROPE_LINEAR) often = 1/              | goldens     |
family: as many heads of keys | llama.h      | s/.kv_heads = 8, .window/.window/                              | defaults    |
family: Qwen2 always in a window | llama.h      | /"qwen2"/s/.window_switch = 1,$//                  | defaults    |
family: layer_types not read | llama.h      | s/if (c->window != INT_MAX) c->full_layers = full;//           | defaults    |
GPU window: one key less     | train.cu   |
    s/return (unsigned)behind < (unsigned)window/return (unsigned)behind + 1 < (unsigned)window/           | gpu-ops     | forward
GPU window: no lower edge    | train.cu   | s/return (unsigned)behind < (unsigned)window/return behind >= 0/ | gpu-ops   | forward
GPU bias: subtracted         | train.cu   | /void bias_kernel/,/^}/s/sum.x\[i\] += term/sum.x[i] -= term/  | gpu-ops     | forward
GPU bias: every eighth row   | train.cu   |
    /^__global__ static void bias_backward_kernel/,/^}/s/dy.rows, c/dy.rows \/ 8, c/                       | gpu-ops     | forward
chat: the end is not learnt  | run/dialogue.h | s/if (end_learnt \&\& r.n > from) r.learnt\[from\] = 1;//     | templates   |
chat: earlier answers learnt | run/rows.h |
    s/if (asked) read_turns(list, where, asked, 0)/if (asked) read_turns(list, where, asked, 1)/                | row-formats |
chat: the user is learnt     | run/dialogue.h |
    s/add_tokens(\&r, t, text, begins, 0);/add_tokens(\&r, t, text, begins, 1);/                              | templates   |
chat: a space of its own      | run/dialogue.h | s/begins = begins \&\& !\*text;/begins = 1;/                      | templates   |
chat: system in the wrong turn | run/dialogue.h | s/chat.is->place == WITHIN_LAST ? last - 1 : /0 ? 0 : /          | templates   |
rows: Dolly without context   | run/rows.h | s/"instruction", "context", /"instruction", NULL, /              | row-formats |
rows: a tool call is nothing  | run/rows.h | s/if (has_field(turn, calls\[j\]) /if (0 /                       | row-files   |
template: nothing trimmed    | run/templates.h | s/.trimmed = BIT(SYSTEM) . BIT(USER) . BIT(ASSISTANT)/.trimmed = 0/ | templates |
template: wide spaces stay    | run/templates.h | s/"\\u3000"}/"\\u2028"}/                                    | templates   |
template: the file is not read | run/templates.h | s/if (!source \&\& text) source/if (text) source/            | own-template |
gzip: the first member alone  | lib/gzip.h | s/for (; at < \*bytes; at += used)/for (; !at; at += used)/      | gzip        |
gzip: cut short is the end    | lib/gzip.h | s/if (said == Z_OK .. said == Z_BUF_ERROR)$/if (0)/              | gzip        |
best: the last of equals      | run/checkpoint.h | s/loss >= r->best)/loss > 1.2 * r->best)/                 | keep-best   |
best: what came last         | run/checkpoint.h |
    s/if (r->best_step \&\& r->best_step != r->step) stage_best/if (0) stage_best/                            | keep-best   |
best: patience never ends     | train.c    | s/r->waited >= opt.patience; }/r->waited > opt.patience + 99; }/ | keep-best   |
best: before training is nothing | train.c | s/r->before < r->best)/0)/                                    | keep-best   |
resume: any base of that name | train.c    |
    s/r->base = base_hash/r->base = 0 * base_hash/                                  | wrong-input | base of that name
merges: the last line first  | tokenizer.c | s/(float)-m->rank/(float)m->rank/                                 | merges      |
merges: whole words by merges | tokenizer.c | s/e->t->whole_words ? find_piece/0 ? find_piece/                 | merges      |
merges: letters one byte off | tokenizer.c | s/i - 33 + 0x7f/i - 33 + 0x80/                                    | merges      |
merges: U+FFFD for every byte | tokenizer.c | s/if (!n) n = broken_length(bytes);/if (!n) n = 1;/               | merges      |
merges: normalized sought at once | tokenizer.c | s/if (a->normalized != normalized) continue;//                 | merges      |
merges: no NFC               | tokenizer.c | s/!normalized \&\& e->t->nfc/0/                                   | merges      |
merges: bytes without a token part words | tokenizer.c | s/e->t->lacks_bytes ? without_missing(e, word) : word/word/ | merges |
merges: a space before a space | tokenizer.c | s/if (e->t->unless_space \&\&/if (0 \&\&/                        | merges      |
merges: an answer with a space of its own | tokenizer.c |
    s/begins \&\& t->space_in_front, begins/t->space_in_front, begins/                                        | byte-level-rows |
merges: U+180E a space       | lib/words.h | s/^#define WHITE_SPACE "/&\\\\x{180e}/                             | merges      |
merges: marks unsorted       | lib/words.h | s/if (marks > 1) sort_marks/if (0) sort_marks/                    | merges      |
merges: what matches is dropped | run/tokenizer_json.h | s/isolated .. inverted, isolated .. !inverted/isolated, 1/ | merges |
merges: digits together      | run/tokenizer_json.h | s/one ? /0 ? /                                           | merges      |
ranks: a lost sum | run/ranks.h | s/^            add(mine, others, 1);/            (void)mine, (void)others;/ | mpi | bone
ranks: a lost loss | run/ranks.h | s/^        sum += other;/        (void)other;/ | mpi | bone
ranks: the next one for a partner | run/ranks.h | s/this_rank() ^ bit;/(this_rank() + bit) % ranks();/ | mpi | bone
ranks: the same partner again | run/ranks.h | s/this_rank() ^ bit;/this_rank() ^ 1;/ | mpi | bone
ranks: a piece alone | run/ranks.h | s/rows_of(x, i, n), others/rows_of(x, 0, n), others/ | mpi | full
ranks: all CPUs for each | run/ranks_mpi.c | s/share += 1.0 \/ users\[i\]/share++/ | mpi | bone
ranks: a row counted twice | train.c |
    s/first += this_rank() \* share \* opt.batch;/first += this_rank() * share * opt.batch - (this_rank() > 0);/ | mpi | bone
ranks: every rank takes all | train.c | s/^    first += this_rank() \* share \* opt.batch;/    (void)share;/ | mpi | bone
ranks: halves not apart | train.c | s/^    copy(earlier, grad);/    zero(earlier);/ | mpi | bone
ranks: one after the other | train.c | s/^    if (count % 2) {/    if (1) {/ | mpi | bone
ranks: one evaluates all | train.c | s/arrlen(losses) % ranks() == this_rank();/1;/ | mpi | bone
ranks: answers of one rank | run/generate.h | s/^    ranks_add(counts, 2);// | mpi-resume | 
ranks: a signal stops one | run/signals.h | s/ranks_largest(interrupted)/(int)interrupted/ | mpi-resume | 
ranks: who dies tells nobody | run/ranks_mpi.c |
    s/MPI_Abort(MPI_COMM_WORLD, status)/for (;;) pause()/ | mpi-failures | bad option
ranks: who has other options goes on | run/ranks_mpi.c | s/if (strcmp(first, own))/if (0)/ | mpi-failures | another
ranks: every rank speaks | run/ranks_mpi.c |
    s/0, &bytes, &unit, &told)/rank, \&bytes, \&unit, \&told)/ | mpi-failures | bad option
ranks: one waits for ever | train.c |
    s/^    sum = sum_over_ranks(grad, sum);/    if (!this_rank()) sum = sum_over_ranks(grad, sum);/ | mpi | bone
merges: BOS where one is named | run/special_tokens.h | s/merges \&\& !json_is_true(add_bos)/0/                  | merges      |
rwkv: sign of dw | ops/cpu.c | s/g.w\[i\] = -exp_real/g.w[i] = exp_real/ | ops | wkv6
rwkv: bonus left out of dk | ops/cpu.c | s/(real)(dSv + u \* r \* vdy)/(real)dSv/ | ops | wkv6
rwkv: the next row left out | ops/cpu.c | s/dx.p \&\& has_next ? x.cols : 0/0/ | ops | shift_mix
rwkv: a row of the text before | ops/cpu.c | s/if (n > own.q) return ROW(x, n - 1)/if (n > 0) return ROW(x, n - 1)/ | splits |
rwkv: sign of what is read | ops/cpu.c | s/m.p\[i\] = q + r \* Sdy/m.p[i] = q - r * Sdy/ | ops | wkv6
rwkv: what is written left in p | ops/cpu.c | s/m.p\[i\] - k \* dSv : 0/m.p[i] : 0/ | ops | wkv6
rwkv: p of the text behind | ops/cpu.c | s/^    clear(m.p, d);// | rwkv-long |
rwkv: dS begins with S | ops/cpu.c | s/^    clear(m.S, d \* d);  .*// | ops | wkv6
rwkv: nothing blown up | ops/cpu.c | s/1 + e > 1 ? m.p\[i\] - k \* dSv : 0/m.p[i] - k * dSv/ | rwkv-long |
rwkv: mean left out of dx | ops/cpu.c | s/(wc\[c\] \* dn\[c\] - g0 - /(wc[c] * dn[c] - / | ops | layernorm
rwkv: relu² at half | ops/cpu.c | s/? 2 \* ROW(x, n)\[c\] \* ROW(dy/? ROW(x, n)[c] * ROW(dy/ | ops | relu²
rwkv: ε of a row for a head | rwkv6.h | s/c->eps \* c->head_divisor \* c->head_divisor/c->eps/ | goldens |
rwkv: key for value | rwkv6.h | s/{MIX_V, \&L->value, L->v,/{MIX_K, \&L->value, L->v,/ | goldens |
rwkv: state of the wrong text | rwkv6.h | s/copy(rows_of(last, s.k, 1)/copy(rows_of(last, 0, 1)/ | cache |
rwkv: the shorter word | tokenizer.c | s/        id = longer;/        id = id < 0 ? longer : id;/ | rwkv-words |
disha: a for b | adapters.h | /^static void disha_layout/,/^}/s/SHAPE(a, b)/SHAPE(b, a)/ | definition | disha
disha: sum of dy left out | adapters.h | /^static void disha_backward/,/^}/s/shard_sum(dz, dy)/zero(dz)/ | gradients | disha
bat-free: another group | adapters.h | s/int g = s \* l->groups\[1\]/int g = s * l->groups[0]/ | definition | bat-free
bat-free: strips over each other | adapters.h | s/if (s == 0 \&\& mode == SET) copy/if (mode == SET) copy/ | gradients | bat-free
'

# By rule: how many of a thousand of a file's small faults (dev/mutate.awk), from which place of the thousand on ($FROM; 0). They
# are all in one build (dev/plant.awk), which a run tells by $MUTANT which of them to have.
share=${SHARE:-15} from=${FROM:-0}
ruled=${RULED:-adapters.h model.h llama.h rwkv6.h backbones.h train.c tokenizer.c $(echo ops/*.[ch] lib/*.h run/*.h)}

# Any of these tests ($TESTS) may turn red by a fault that a rule has planted: the quick ones, and those that alone reach some
# lines.
tests=${TESTS:-
gradients ops residual-copy twice stale-memory accumulation splits recompute zero-start zero-rows merge definition frozen-is-full
svd lora-start saved-lora residual goldens target-modules uneven attention cache matmul same-bits in-place exp halves
beyond-blocks beyond-panels beyond-buffers few-rows beyond-chunks beyond-rows adamw update schedules expected-ids own-ids
any-bytes merges refused-merges byte-level-rows byte-level-bytes byte-level-files row-formats templates
trimmed shortened as-they-come plot own-template gzip pieces refused-tokenizers added-twice special-tokens alone first-token
prompt-edge stops config defaults rows windows
cut-rows
targets config-spelling json-values row-files safetensors too-many no-place epoch-rows cut-file escapes sampling
together answers room nan-saved same-options option-tables option-names methods-named full-disk output
kept-files unknown-fields discard mpi
rwkv-long rwkv-words rwkv-start shard-note odd-merges counts bf16-start block-ends base-size descriptors quota wrong-input
}

libs='-ljansson -lz -lpcre2-8 -lutf8proc -lm'
mpi=$(command -v mpicc)                                 # then there is a program for several ranks, too

# directory, flags: compiles the tests of the sources in it, and with them the program (--train). Code that is not the ops' is
# not optimised: it runs longer, and is compiled in half the time.
compile_tests() {
    sed -i 's|^#include "ops/cpu.c"|&\n#pragma GCC optimize ("O0")|' "$1/test_all.c"
    ${CC:-cc} -std=gnu11 -O1 -march=native -w -fopenmp -DTHIS_BUILD=BOTH $2 -c "$1/test_all.c" -o "$1/test.o"
}
compile_tokenizer() { ${CC:-cc} -std=gnu11 -O1 -march=native -w -c "$1/tokenizer.c" -o "$1/tokenizer.o"; }
compile_ranks() { [ -z "$mpi" ] || "$mpi" -std=gnu11 -O1 -w -c "$1/run/ranks_mpi.c" -o "$1/ranks.o"; }
link_tests() { # directory, the ranks' directory (the same), objects besides
    local objects="$1/test.o $1/tokenizer.o ${*:3}"
    ${CC:-cc} -fopenmp $objects -o "$1/test" $libs && { [ -z "$mpi" ] ||
        ${CC:-cc} -fopenmp $objects "${2:-$1}/ranks.o" -o "$1/test_mpi" -lmpi $libs; }
}

# gsm8k trains, pairs are of floats. All other tests are those in double.
in_float() { [[ $1 = gsm8k || $1 = *pairs || $1 = bf16 ]]; }

# directory, file, test, order: the tests of the sources in it; only what the file belongs to is compiled anew
build() {
    if in_float "$3"; then
        cp $whole/*.o "$1"; compile_tests "$1" -O2 && link_tests "$1"; return
    fi
    case $2 in
    train.cu|*.cuh)
        local numbers=DOUBLE half=f64
        [[ $4 != *bf16 ]] || { numbers=BFLOAT16; half=bf16; }
        ${CXX:-c++} -std=c++17 -O1 -w -fopenmp -D$numbers -I. -x c++ -c "$1/train.cu" -o "$1/emu.o" &&
        ${CXX:-c++} -fopenmp build/cpu_half.o build/gpu_half_$half.o build/tokenizer.o "$1/emu.o" -o "$1/test" $libs ;;
    tokenizer.c|lib/words.h)
        cp $whole/*.o "$1"; compile_tokenizer "$1" && link_tests "$1" ;;
    run/ranks_mpi.c)
        cp $whole/*.o "$1"; compile_ranks "$1" && link_tests "$1" ;;
    ops/utf8.h)
        cp $whole/*.o "$1"; compile_tests "$1" -DDOUBLE && compile_tokenizer "$1" && link_tests "$1" ;;
    *)
        cp $whole/*.o "$1"; compile_tests "$1" -DDOUBLE && link_tests "$1" ;;
    esac
}

copy_sources() { rm -rf "$1"; mkdir -p "$1"; cp -r --parents *.h *.c train.cu ops lib run paper dev/halves.h "$1"; }

run_test() { # directory, test, method: what it leaves lies in the directory
    TMPDIR=$PWD/$1 TRAIN="$PWD/$1/test --train" TRAIN_MPI="$PWD/$1/test_mpi --train" OMP_NUM_THREADS=1 FIRST_FAILURE=1 \
        timeout ${LIMIT:-240} "$1/test" "$2" ${3:+"$3"} </dev/null >"$1/log" 2>&1
}

try() { # directory, what, file, expression, test, method or order
    local dir=$1 method=$6 order=
    [[ $3 != *.cu* ]] || { order=${6% bf16}; method=; }
    copy_sources "$dir"
    sed -i "$4" "$dir/$3"
    if cmp -s "$3" "$dir/$3"; then echo "✗ $2: the expression changes nothing"
    elif ! build "$dir" "$3" "$5" "$6" 2>"$dir/errors"; then echo "✗ $2: does not compile"; head -3 "$dir/errors"
    elif CUDA_ORDER=$order run_test "$dir" "$5" "$method"; then echo "✗ $2: $5 stays green"
    elif grep -q ': skipped, .* is not here$' "$dir/log"; then echo "- $2: $(tail -n 2 "$dir/log" | head -n 1)"
    else echo "✓ $2: $5 turns red"; fi
}

try_chosen() { # directory, what, number, test, method: one of the table that is in the build with all faults
    mkdir -p "$1"
    ln -sf "$PWD/$whole"/test* "$1"
    if MUTANT=$3 run_test "$1" "$4" "$5"; then echo "✗ $2: $4 stays green"
    else echo "✓ $2: $4 turns red"; fi
}

try_planted() { # directory, file, line, what stands there then, number
    local ms test
    mkdir -p "$1"
    ln -sf "$PWD/$whole"/test* "$1"
    while read -r ms test; do                           # the quickest first; those that never come here cannot tell
        grep -qx "$5" "$whole/reached.$test" || continue
        LIMIT=$((10 + ms / 100)) MUTANT=$5 run_test "$1" "$test" || { echo "✓ $2:$3: $4: $test turns red"; return; }
    done <$whole/tests
    echo "✗ $2:$3: $4: no test turns red"
}

measure() { # directory, test: unbroken it is green; how many ms it takes, and which faults it would meet
    local start; start=$(date +%s%N)
    mkdir -p "$1"
    ln -sf "$PWD/$whole"/test* "$1"
    LIMIT=600 REACHED=$PWD/$1/reached run_test "$1" "$2" || { echo "✗ $2 is red without a fault"; cat "$1/log"; return; }
    echo "$((($(date +%s%N) - start) / 1000000)) $2" >>$whole/tests
    od -An -v -t d4 -w4 "$1/reached" | awk '$1 { print NR - 1 }' >"$whole/reached.$2"
}

# A test that is red without a fault would turn red for every one.
green() { # directory, test, method
    mkdir -p "$1"
    ln -sf "$PWD/$whole"/test* "$1"
    run_test "$1" "$2" "$3" || { echo "✗ $2 $3 is red without a fault"; cat "$1/log"; }
}

trim() { local s="${1#"${1%%[! ]*}"}"; echo "${s%"${s##*[! ]}"}"; }

fields() { printf '%s\1' "$@"; echo; }

# The table's mutants with this word, every so-and-so-manieth: lines of fields between bytes 1, a number in front.
choose_mutants() { # word, every
    local what file expression test method i=0
    while IFS='|' read -r what file expression test method; do
        [[ "$what" == *[a-z]* && "$what $file $expression" == *"$1"* ]] || continue
        i=$((i + 1))
        [ $((i % $2)) = 0 ] || continue
        fields $i "$(trim "$what")" "$(trim "$file")" "$(trim "$expression")" "$(trim "$test")" "$(trim "$method")"
    done < <(sed ':row; N; s/\n  */ /; t row; P; D' <<<"$mutants")
}

# Every mutant: what tries it, and its arguments.
list_mutants() {
    local file number what expression test method line column length text
    while IFS=$'\1' read -r number what file expression test method; do
        if grep -q "^$number	" "$whole/planted.${file//\//.}" 2>/dev/null; then
            fields try_chosen "$what" $number "$test" "$method"
        else fields try "$what" "$file" "$expression" "$test" "$method"; fi
    done <$whole/chosen
    for file in $planted; do
        [ -f "$whole/planted.${file//\//.}" ] || continue
        while IFS=$'\t' read -r number line column length text; do
            [ "$number" -gt 1000 ] || continue
            what=$(changed "$file" "$line" "$column" "$length" "$text")
            grep -qxF "$file: $what" dev/mutants.equivalent ||
                fields try_planted "$file" "$line" "$what" "$number"
        done <"$whole/planted.${file//\//.}"
    done
}

# file, sed expression: line, column, length and what stands there then, of a line that it changes or, with a ; instead,
# removes; nothing where it does more.
fault_of() {
    sed "$2" "$1" | LC_ALL=C awk '
        NR == FNR { old[++n] = $0; next }
        { new[++m] = $0 }
        END {
            for (i = 1; i <= m && old[i] == new[i]; i++) ;
            for (j = i + (m == n); j <= m; j++) if (m < n - 1 || old[j + n - m] != new[j]) exit
            if (m == n - 1) { at = match(old[i], /[^ ]/); print i, at, length(old[i]) - at + 1, ";" }
            if (m != n || i > n) exit
            a = length(old[i])
            b = length(new[i])
            for (at = 1; at <= a && at <= b && substr(old[i], at, 1) == substr(new[i], at, 1); at++) ;
            for (; a >= at && b >= at && substr(old[i], a, 1) == substr(new[i], b, 1); a--) b--
            print i, at, a - at + 1, substr(new[i], at, b - at + 1)
        }' OFS='\t' "$1" -
}

changed() { # file, line, column, length, what stands there instead: the line with this fault, or "without" and the line
    LC_ALL=C awk -v n="$2" -v at="$3" -v long="$4" -v text="$5" '
        NR == n && text == ";" { sub(/^ */, "without "); print }
        NR == n && text != ";" { $0 = substr($0, 1, at - 1) text substr($0, at + long); sub(/^ */, ""); print }' "$1"
}

# Compiles the sources that have all faults.
compile_planted() {
    local file to=$whole/planted bad=0
    mkdir -p $to
    for file in test_all tokenizer; do
        ${CC:-cc} -std=gnu11 -O1 -march=native -w -fopenmp -DTHIS_BUILD=BOTH -DDOUBLE -include $whole/mutant.h \
            -c $whole/src/$file.c -o $to/${file%_all}.o || bad=1
    done
    [ $bad = 0 ] && link_tests $to $whole $whole/mutant.c && rm $to/*.o && mv $to/* $whole
}

# The build with all faults: the table's, numbered from 1, as far as they change one line, and the rules', from 1001. Those
# that find no place in it, or are no C, are left out.
plant_all() {
    local file number=1000 round what expression test method fault
    copy_sources $whole/src
    echo 'extern int mutant, reached[1 << 16];
static inline int mutated(int n) { reached[n] = 1; return mutant == n; }' >$whole/mutant.h
    echo '#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
int mutant;
__attribute__((aligned(4096))) int reached[1 << 16];        // shared by all processes of a test, through a file
__attribute__((constructor)) static void choose(void)
{
    if (getenv("MUTANT")) mutant = atoi(getenv("MUTANT"));
    int file = getenv("REACHED") ? open(getenv("REACHED"), O_RDWR | O_CREAT, 0666) : -1;
    if (file >= 0 && (ftruncate(file, sizeof reached) || mmap(reached, sizeof reached, PROT_READ | PROT_WRITE,
                                                              MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)) abort();
    if (file >= 0) close(file);
}' >$whole/mutant.c
    for file in $planted; do
        LC_ALL=C awk -v share="$share" -v from="$from" -f dev/mutate.awk "$file" | cut -f2- |
            awk -v n=$number '{ print NR + n "\t" $0 }' >"$whole/list.${file//\//.}"
        number=$((number + $(wc -l <"$whole/list.${file//\//.}")))
    done
    while IFS=$'\1' read -r number what file expression test method; do
        [[ $file != *.cu* ]] && [ "$file" != run/ranks_mpi.c ] && ! in_float "$test" || continue
        fault=$(fault_of "$file" "$expression")
        [ -z "$fault" ] || echo "$number	$fault" >>"$whole/list.${file//\//.}"
    done <$whole/chosen
    for round in 1 2 3 4; do
        for file in *.[ch] */*.[ch]; do
            [ -s "$whole/list.${file//\//.}" ] || continue
            : >"$whole/planted.${file//\//.}"
            LC_ALL=C awk -F'\t' -v planted="$whole/planted.${file//\//.}" -f dev/plant.awk \
                "$whole/list.${file//\//.}" "$file" >"$whole/src/$file"
        done
        compile_planted 2>$whole/errors && return
        sed -n "s|^$whole/src/\([^:]*\):\([0-9]*\):.*error: .*else.*|\1 \2 - 1|p; t
                s|^$whole/src/\([^:]*\):\([0-9]*\):.*error:.*|\1 \2|p" $whole/errors | while read -r file number; do
            number=$((number))                          # an else without its if is the fault of the line before
            awk -F'\t' -v n="$number" '$2 != n' "$whole/list.${file//\//.}" >$whole/kept &&
                mv $whole/kept "$whole/list.${file//\//.}"
        done
    done
    cat $whole/errors; return 1
}

in_background() { # a command: two at a time share the CPUs. bash says "Aborted" of one that crashes
    "$@" 2>/dev/null &
    while [ "$(jobs -r | wc -l)" -ge "$(nproc)" ]; do wait -n; done
}

in_a_directory() { # directory, function, its further arguments
    "$2" "$1" "${@:3}"
    rm -rf "$1"
}

try_all() {
    local line field test method i=0
    if [ -n "$planted" ]; then
        for test in $tests; do in_background in_a_directory build/mutant.t$((i += 1)) measure $test; done
        wait
        sort -n $whole/tests -o $whole/tests
    fi
    while IFS=$'\1' read -r test method; do
        in_background in_a_directory build/mutant.t$((i += 1)) green $test $method
    done < <(grep -a ^try_chosen $whole/list | cut -d $'\1' -f 4,5 | sort -u)
    while IFS= read -r line; do
        IFS=$'\1' read -ra field <<<"$line"
        in_background in_a_directory build/mutant.$((i += 1)) "${field[@]}"
    done <$whole/list
    wait
}

export OMP_WAIT_POLICY=passive
whole=build/mutants only=$1 every=1 planted=
rm -rf $whole build/mutant.*
copy_sources $whole/src
case $1 in
--sample) only=; every=$(($(choose_mutants '' 1 | wc -l) / $2)) ;;
--rules) only=$'\1'; planted=$ruled ;;
'') planted=$ruled ;;
*) [[ " $ruled " != *" $1 "* ]] || planted=$1 ;;
esac
choose_mutants "$only" $every >$whole/chosen
! grep -q '\.cu' $whole/chosen ||
    MAKEFLAGS= make -s -j"$(nproc)" build/cpu_half.o build/gpu_half_f64.o build/gpu_half_bf16.o build/tokenizer.o
compile_tests $whole/src -DDOUBLE && compile_tokenizer $whole/src && compile_ranks $whole/src || exit 1
mv $whole/src/*.o $whole
plant_all || exit 1
list_mutants >$whole/list
try_all | tee build/mutants.log
rm -rf $whole
failed=$(grep -c '✗' build/mutants.log)
echo "$((SECONDS / 60)) minutes $((SECONDS % 60)) s"
echo "$(grep -c '✓' build/mutants.log) passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
