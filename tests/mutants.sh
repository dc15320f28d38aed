#!/usr/bin/env bash
# Tests the tests: breaks megalodon.c in one place at a time and demands that some test notices. From the root
# of the repository: bash tests/mutants.sh [word]; with a word, only those whose line contains it.
#
# A line of the list is `function: old text  =>  new text`. The old text must stand in exactly one line of
# that function; a mutant that does not apply or does not compile is a failure too.

list() {
    cat <<'END'
exp_real: x <= 88.7228317f ? p : x * 1e38f  =>  x <= 88.7228317f ? p : 3e38f
exp_real: x <= 88.7228317f ? p  =>  x <= 88.7f ? p
exp_real: x < -87.3365402f ? 0 : p  =>  x < -87.3365402f ? 1e-38f : p
exp_real: x < -87.3365402f ? 0 : p  =>  x < -64.0f ? 0 : p
exp_real: x < -87.3365402f ? 0 : p  =>  p
exp_real: 1.0f / 120  =>  1.0f / 100
exp_real: - n * 1.42860677e-6f  =>
sigmoid: exp_real(-x)  =>  exp_real(x)
matmul_tile: c[j] += tile[i][j]  =>  c[j] = tile[i][j]
matmul_tile: c[j] = tile[i][j]  =>  c[j] += tile[i][j]
matmul_pack: panel[i * si + k]  =>  panel[i * si]
matmul_serial: k0 > 0 || add);  =>  add);
matmul_serial: ak = ta ? (size_t)lda : 1  =>  ak = ta ? (size_t)M : 1
matmul_serial: a + (size_t)i * depth  =>  a
matmul_row: add ? c[j] + sum : sum  =>  sum
matmul_row: c[j] += a[k]  =>  c[j] = a[k]
matmul: bias[j0 + j] + (add  =>  (add
matmul: (add ? c[(size_t)i * ldc + j] : 0)  =>  0
matmul: b, ldb, add || bias, c);  =>  b, ldb, add, c);
matmul: b, ldb, add || bias, c, ldc)  =>  b, ldb, add, c, ldc)
sum_rows: ((xr[c] - m) * s)  =>  (xr[c] * s)
sum_rows: double m = mean ? mean[(size_t)r * G + j] : 0, s  =>  float m = mean ? mean[(size_t)r * G + j] : 0, s
sum_rows: ((xr[c] - m) * s)  =>  (xr[c] - m)
sum_rows: out[at + c] += (real)sum[c]  =>  out[at + c] = (real)sum[c]
embedding_forward: scale * e[c]  =>  e[c]
embedding_backward: de[c] += scale  =>  de[c] = scale
embedding_backward: scale * dout  =>  dout
mask_row: rows * (uint64_t)width  =>  rows
dropout: skip = first % 4  =>  skip = from % 4
dropout: start / run * mask.row  =>  start
mask_query: (uint64_t)b * H + h  =>  (uint64_t)h
mask_query: (uint64_t)t * C  =>  0
dropout: >> 32 << 16)  =>  >> 32 << 15)
dropout: >= limit  =>  < limit
dropout: inp[at + i] * scale  =>  inp[at + i]
timestep_norm_forward: n += g  =>  n += 1
timestep_norm_forward: (double)g * (double)count[b]  =>  (double)count[b]
timestep_norm_forward: s2 - s1 * s1 / n  =>  s2
timestep_norm_forward: double from = n > 0 ? m : x[0]  =>  double from = x[0]
timestep_norm_forward: double m = prev_mean ? prev_mean[b * G + j] : 0, m2 =  =>  float m = prev_mean ? prev_mean[b * G + j] : 0, m2 =
timestep_norm_forward: double m = prev_mean ? prev_mean[b * G + j] : 0, m2 =  =>  double m = prev_mean ? prev_mean[b * G + j] : 0; float m2 =
timestep_norm_forward: prev_m2 ? prev_m2[b * G + j] : 0  =>  0
timestep_norm_forward: m2_out[b * G + j] = m2  =>  m2_out[b * G + j] = 0
timestep_norm_forward: * (w[i] + 1) + bs[i]  =>  * w[i] + bs[i]
timestep_norm_forward: sqrt(m2 / n + eps)  =>  sqrt(m2 / n)
timestep_norm_backward: U += -r * s / n  =>  U += r * s / n
timestep_norm_backward: V += dvar / n  =>  V += dvar
timestep_norm_backward: W += dvar / n * m  =>  W = dvar / n * m
timestep_norm_backward: dvar = -0.5 * r * r * r * d  =>  dvar = -0.5 * r * r * d
timestep_norm_backward: t--, n -= g  =>  t--
timestep_norm_backward: (w[i] + 1) * dy[i] + shift  =>  w[i] * dy[i] + shift
timestep_norm_backward: + 2 * V * (x[i] - m)  =>
timestep_norm_backward: U - 2 * (W - m * V)  =>  U
timestep_norm_backward: double m = mean[row * G + j], r  =>  float m = mean[row * G + j]; double r
timestep_norm_backward: uvw[3] = {U, V, W}  =>  uvw[3] = {U, V, 0}
timestep_norm_backward: count ? (double)g * (double)count[b] : 0  =>  0
timestep_norm_combine: count ? (double)(D / G) * (double)count[i / G] : 0  =>  0
timestep_norm_combine: if (k == p->cp_rank)  =>  if (k == 0)
timestep_norm_combine: + d * d * n * there / (n + there)  =>
timestep_norm_combine: m += d * there / (n + there)  =>  m += d * there / n
timestep_norm_combine: (double)p->lengths[k]  =>  (double)p->lengths[0]
timestep_norm_combine: mean_end[i] = m  =>  mean_end[i] = mean[i]
timestep_norm_combine_backward: k = p->cp_rank + 1  =>  k = p->cp_rank
timestep_norm_combine_backward: inp[at + i] * V - W  =>  inp[at + i] * V
cema_reduce: L - 1 - t0 - t  =>  t0 + t
cema_reduce: q_re * c.g_im[u] + q_im * c.g_re[u]  =>  q_re * c.g_im[u]
cema_reduce: q_im = -q_im  =>  q_im = q_im
power: n > 0; n /= 2  =>  n > 1; n /= 2
cema_combine: if (backward) q = conj(q)  =>
cema_combine: backward ? p->cp_size - 1 - i : i  =>  i
cema_combine: p->lengths[k] != length  =>  length == 0
cema_combine: if (k == p->cp_rank)  =>  if (k == 0)
cema_combine: decay * sum  =>  sum
cema_combine: end[im] = (real)cimag(sum)  =>  end[im] = 0
timestep_norm_layer_forward: in ? in->count : NULL  =>  NULL
timestep_norm_layer_forward: mean_out = m2_out = NULL  =>  (void)0
cema_layer_forward: h_out = NULL  =>  (void)0
megalodon_chunk_parallel: m->start += i < pieces->cp_rank  =>  m->start += i <= pieces->cp_rank
megalodon_update: m->memory[PARAMS] + m->own[s].first  =>  m->memory[PARAMS]
megalodon_update: m->memory[GRADS] + m->own[s].first  =>  m->memory[GRADS]
megalodon_grad_norm: m->memory[GRADS] + m->own[s].first  =>  m->memory[GRADS]
megalodon_update: m1 += n, m2 += n  =>  m1 += n
block_copy: src + (from - first)  =>  src
block_copy: at += held[s++].count  =>  s++
megalodon_backward: m->ready(m, l + 1)  =>  m->ready(m, l)
megalodon_backward: if (m->ready) m->ready(m, 0)  =>
mask_of: + (uint64_t)m->start)  =>  )
mask_of: ? (uint64_t)m->whole :  =>  ? (uint64_t)m->L :
mask_of_attention: num_heads - 1)  =>  num_heads)
cema_coeffs_forward: 2 * PI * (n + 1) / N  =>  2 * PI * n / N
cema_coeffs_forward: (1 - a * b) * sin(phi)  =>  (1 - a) * sin(phi)
cema_coeffs_forward: gamma[2 * in] / sqrt(N)  =>  gamma[2 * in] / N
cema_coeffs_backward: dc->p[out] - b * dabs  =>  dc->p[out] + b * dabs
cema_coeffs_backward: -a * dabs * b  =>  a * dabs * b
cema_coeffs_backward: dturn * turn * (1 - turn)  =>  dturn * turn
cema_coeffs_backward: dc->q_im[out] * re - dc->q_re[out] * im  =>  dc->q_im[out] * re + dc->q_re[out] * im
cema_coeffs_backward: dgamma[2 * in + 1] +=  =>  dgamma[2 * in + 1] =
cema_forward: y[t][u] = om[u] * x[t][u]  =>  y[t][u] = x[t][u]
cema_forward: c.q_re[u] * old - c.q_im[u] * im[u]  =>  c.q_re[u] * old + c.q_im[u] * im[u]
cema_forward: c.g_re[u] * re[u] - c.g_im[u] * im[u]  =>  c.g_re[u] * re[u]
cema_forward: h_in && i < 2 * N  =>  h_in && i < N
cema_forward: h_out && i < 2 * N  =>  h_out && i < N
cema_forward: (size_t)b * blocks + block) * 2 * N  =>  (size_t)b * blocks) * 2 * N
cema_backward: dx[t][u] = om[u] * dy[t][u]  =>  dx[t][u] = 0 * dy[t][u]
cema_backward: dom[u] += x[t][u]  =>  dom[u] = x[t][u]
cema_backward: G_im * h_re[t][u] - G_re * h_im[t][u]  =>  G_im * h_re[t][u] + G_re * h_im[t][u]
cema_backward: s.g_im[u] -= dy[t][u]  =>  s.g_im[u] += dy[t][u]
cema_backward: s.g_re[u] += dy[t][u] * h_re[t + 1][u]  =>  s.g_re[u] += dy[t][u] * h_re[t][u]
cema_backward: future[n][u] = f_re, future[N + n][u] = f_im  =>  future[n][u] = f_re
cema_backward: dh && i < 2 * N; i++) strip_write  =>  dh && i < N; i++) strip_write
cema_backward: strip_add(domega  =>  strip_write(domega
cema_backward: + block) * 2 * N * D + d0  =>  ) * 2 * N * D + d0
rmsnorm_forward: squares / D + eps  =>  squares / D
rmsnorm_forward: weight[c] + 1 : 1  =>  weight[c] : 1
rmsnorm_forward: (double)x[c] * x[c]  =>  x[c] * x[c]
rmsnorm_backward: dot /= D  =>  dot /= R
rmsnorm_backward: - x[c] * s * dot  =>
rmsnorm_backward: * (x[c] * s)  =>  * x[c] * s
rmsnorm_backward: if (dweight)  =>  if (0)
linear_forward: K, add, bias, out  =>  K, 0, bias, out
linear_backward: K, add, NULL, dinp  =>  K, 0, NULL, dinp
linear_backward: inp, K, 1, NULL, dweight  =>  inp, K, 0, NULL, dweight
linear_backward: if (dbias)  =>  if (0)
qk_forward: (gamma[c] + 1) * scale  =>  gamma[c] * scale
qk_forward: (gamma[Z + c] + 1) * scale  =>  (gamma[c] + 1) * scale
qk_forward: beta[Z + c]  =>  beta[c]
qk_backward: (gamma[c] + 1) + dk  =>  (gamma[c] + 1) - dk
qk_backward: (real)sum[0][c] * scale  =>  (real)sum[0][c]
qk_backward: sum[3][c] += dk  =>  sum[3][c] += dq
rope_table: -2.0 * j / dz  =>  -1.0 * j / dz
rope_turn: (count ? count[b] : 0) + t  =>  t
rope_turn: (count ? count[b] : 0) + t  =>  (count ? count[0] : 0) + t
rope_turn: re * turn[0] - im * s  =>  re * turn[0] + im * s
rope_backward: count, -1, B  =>  count, 1, B
silu_forward: inp[i] * sigmoid(inp[i])  =>  sigmoid(inp[i])
silu_backward: 1 + inp[i] * (1 - s)  =>  1 + inp[i]
gate_forward: a[i] * (b[i] * sigmoid(b[i]))  =>  a[i] * sigmoid(b[i])
gate_forward: a[i] * (b[i] * sigmoid(b[i]))  =>  a[i] * b[i] * sigmoid(b[i])
gate_backward: 1 + b[i] * (1 - s)  =>  1 - b[i] * (1 - s)
gate_backward: d * (b[i] * s)  =>  d * s
attention_chunk_forward: nk - nq + i + 1;  =>  nk - nq + i + (i > 0);
attention_chunk_forward: nk - nq + i + 1;  =>  nk - nq + i + 1 + (i < nq - 1);
attention_chunk_forward: j < nk; j++) s[j] = 0  =>  j < nk; j++) s[j] = 1e-3
attention_chunk_forward: mask_row(mask, i, C)  =>  mask
attention_chunk_backward: dropout(ds, ds, mask_row(mask, i, C)  =>  dropout(ds, ds, mask
attention_chunk_backward: dropout(s, s, mask_row(mask, i, C)  =>  dropout(s, s, mask
attention_chunk_backward: q, ldz, add, NULL, dk  =>  q, ldz, 0, NULL, dk
attention_chunk_backward: dout, lde, add, NULL, dv_out  =>  dout, lde, 0, NULL, dv_out
cache_chunk: (size_t)b * L + t  =>  (size_t)b * L
cache_chunk: (size_t)b * C + at  =>  (size_t)b * C
attention_forward: cached = past > 0 && chunk == 0  =>  cached = past > 0
attention_forward: (cached ? past : 0) + t - from  =>  t - from
attention_forward: ceil_div(L - 1, C) + 1 : ceil_div  =>  ceil_div(L, C) : ceil_div
attention_forward: past == 0 || past + L > C  =>  past + L > C
attention_forward: b, h, H, t, C)  =>  b, h, H, 0, C)
attention_backward: int n = min(C, L - t0)  =>  int n = L - t0 < C ? 1 : C
attention_backward: i < last,  =>  1,
attention_backward: i < last,  =>  0,
attention_backward: b, h, H, t0 + i, C)  =>  b, h, H, t0, C)
attention_chunk_forward: top + (real)log(sum)  =>  (real)log(sum)
attention_chunk_forward: s[j] /= sum  =>  s[j] /= 1
attention_chunk_forward: sum += overflow  =>
attention_chunk_backward: s[j] /= sum  =>  s[j] /= 1
attention_chunk_backward: ds[j] - dot  =>  ds[j]
attention_chunk_backward: s[j] - l)  =>  s[j])
attention_chunk_backward: s[j] = ds[j] = 0  =>  s[j] = 0
attention_forward: past = count ?  =>  past = 0 && count ?
layernorm_forward: double m = sum / D  =>  double m = 0
layernorm_forward: double sum = 0, squares = 0  =>  real sum = 0, squares = 0
layernorm_forward: (bias ? bias[c] : 0)  =>  0
layernorm_backward: a - sum - n * dot  =>  a - n * dot
layernorm_backward: a - sum - n * dot  =>  a - sum
layernorm_backward: a * (real)((x[c] - m) * s)  =>  a * (real)(x[c] - m) * (real)s
layernorm_backward: sum_rows(dbias  =>  if (0) sum_rows(dbias
rescale_backward: = alpha[c] * dout  =>  = dout
add: out[i] += inp[i]  =>  out[i] = inp[i]
output_loss: losses[r0 + r] = target < 0 ? 0 :  =>  losses[r0 + r] =
output_loss: target < 0 ? 0 : (real)(grad_scale / sum)  =>  (real)(grad_scale / sum)
output_loss: (real)(grad_scale / sum)  =>  (real)(1 / sum)
output_loss: l[target] = (real)dtarget  =>  l[target] -= 0
output_loss: grad_scale * (l[target] - sum) / sum  =>  (real)(grad_scale * l[target] / sum) - grad_scale
output_loss: log(sum) + (top - at_target)  =>  log(sum) + top - at_target
output_loss: sum += overflow  =>
output_loss: *xr = x + (size_t)r0 * D  =>  *xr = x
output_loss: dx + (size_t)r0 * D, 0  =>  dx + (size_t)r0 * D, 1
cema_layer_forward: out->h + at : NULL  =>  out->h : NULL
mega_forward: dropout(a->mx, a->mx  =>  dropout(s->dmx, a->mx
mega_forward: DROP_GATED, c->hidden_dropout  =>  DROP_GATED, c->dropout
mega_forward: add(a->y, x  =>  add(a->y, a->y
mask_of: m->dropping ? p : 0  =>  p
mask_of: .step = (uint32_t)m->draw.step  =>  .step = 0
mask_of: (uint64_t)m->draw.row *  =>  0 *
mega_backward: const real *dsum = mega_mask.p > 0 ? s->dxt : dy  =>  const real *dsum = dy
mega_backward: dropout(s->do_, s->do_, gated_mask  =>  dropout(s->v, s->v, gated_mask
mega_backward: dropout(s->gated, s->gated, gated_mask  =>  dropout(s->v, s->v, gated_mask
mega_backward: dropout(s->dmx, s->dmx,  =>  dropout(s->v, s->v,
timestep_norm_layer_backward: rstd, m->before.count, B  =>  rstd, NULL, B
nffn_forward: add(out, x  =>  add(out, a->y
nffn_forward: dropout(f2, f2  =>  dropout(a->u, a->u
nffn_backward: if (nffn_mask.p > 0) df2  =>  if (nffn_mask.p > 1) df2
nffn_backward: dropout(s->dhidden, s->dhidden  =>  dropout(s->df1, s->df1
nffn_backward: dropout(s->hidden, s->hidden  =>  dropout(s->df1, s->df1
remember: memcpy(s->h, state->h  =>  memset(s->h, 0
remember: memcpy(s->count, state->count  =>  memset(s->count, 0
megalodon_forward: dropout(m->x[0], m->x[0]  =>  dropout(m->x[1], m->x[0]
megalodon_backward: dropout(s->dx, s->dx  =>  dropout(s->dy, s->dx
remember: s->count[b] += m->start  =>  s->count[b] += 0
block_backward: &m->before, NULL  =>  NULL, NULL
megalodon_activation: m->acts_layer != layer)  =>  m->acts_layer < 0)
megalodon_zero_grad: i < m->num_params  =>  i < 1
state_reset: s->count[row] = 0  =>  s->count[0] = 0
state_reset: s->mean + i * s->G, 0  =>  s->mean + i, 0
state_reset: s->h + i * s->modes, 0  =>  s->h + i, 0
mega_forward: linear_forward(a->v_pre, 0, a->xt  =>  linear_forward(a->v_pre, 0, a->mx
mega_forward: linear_forward(a->r_pre, 0, a->mx  =>  linear_forward(a->r_pre, 0, a->xt
mega_forward: a->k, m->rope, count  =>  a->k, m->rope, NULL
mega_backward: linear_backward(s->dmx, 1, dw->wr  =>  linear_backward(s->dmx, 0, dw->wr
mega_backward: linear_backward(s->dxt, 1, dw->wv  =>  linear_backward(s->dxt, 0, dw->wv
mega_backward: rope_backward(s->dk, s->dk  =>  rope_backward(s->dk, s->dq
mega_backward: silu_backward(s->dv, s->dv, a->v_pre  =>  silu_backward(s->dv, s->dv, a->r_pre
mega_backward: add(dx, dy, (size_t)R * D)  =>  add(dx, dy, 0)
nffn_forward: gate_forward(s->hidden, a->f3, a->f1  =>  gate_forward(s->hidden, a->f1, a->f3
nffn_backward: linear_backward(du, c->swiglu  =>  linear_backward(du, 0
block_forward: m->acts_layer = layer  =>  m->acts_layer = 0
block_backward: m->acts_layer != layer  =>  m->acts_layer < 0
block_backward: add(s->dx, s->dmega  =>  memcpy(s->dx, s->dmega
embedding_scale: sqrt(c->model_dim)  =>  1
megalodon_forward: piece ? m->whole : L  =>  piece ? m->whole : 1
megalodon_forward: piece ? m->whole : L  =>  L
megalodon_forward: b < B; b++) state->count  =>  b < 1; b++) state->count
timestep_norm_layer_forward: at = (size_t)layer * B * G  =>  at = 0 * (size_t)layer * B * G
megalodon_loss: targets[r] >= 0  =>  targets[r] >= -1
megalodon_backward: embedding_scale(c)  =>  1
megalodon_logits: m->final + first * D  =>  m->final
megalodon_grad_norm: total += sums[p]  =>  total = sums[p]
megalodon_grad_norm: return sqrt(total)  =>  return total
megalodon_update: k = (double)update + 1  =>  k = (double)update + 2
megalodon_update: lr / (1 - pow(o->beta1, k))  =>  lr
megalodon_update: 1 / sqrt(1 - pow(o->beta2, k))  =>  1
megalodon_update: 1 - lr * o->weight_decay  =>  1 - o->weight_decay
megalodon_update: c2 * g * g  =>  c2 * g
megalodon_update: grad[i] * gs  =>  grad[i]
megalodon_update: * root + eps  =>  * root
megalodon_update: + (m2[i] - m2[i])  =>
megalodon_update: m->coeffs_valid = 0  =>  m->coeffs_valid = 1
acts_take: m->mode != MEGALODON_TRAIN) arena  =>  m->mode != MEGALODON_TRAIN + 9) arena
acts_take: m->mode != MEGALODON_INFER || l < 2  =>  l < 2
megalodon_write: m->coeffs_valid = 0  =>  m->coeffs_valid = 1
state_read: (char *)s->memory + first  =>  (char *)s->memory
state_write: (char *)s->memory + first  =>  (char *)s->memory
END
}

# Prints a file with the mutation made; fails unless the old text stood there exactly once.
mutate() { # function, old, new, file
    NAME=$1 OLD=$2 NEW=$3 awk '
        /^[a-z]/ && index($0, ENVIRON["NAME"] "(") { inside = 1 }
        inside && (at = index($0, ENVIRON["OLD"])) {
            rest = substr($0, at + length(ENVIRON["OLD"]))
            count += 1 + (index(rest, ENVIRON["OLD"]) > 0)
            $0 = substr($0, 1, at - 1) ENVIRON["NEW"] rest
        }
        { print }
        /^}/ || /^[a-z].*}$/ { inside = 0 }
        END { exit count != 1 }' "$4"
}

flags="-std=gnu11 -O1 -w -DSTOP_AT_FAILURE"
CC=${CC:-cc}

build() { # test, in a folder with a megalodon.c
    case $1 in
    test_layers) $CC $flags -DMEGALODON_DOUBLE tests/test_layers.c "$tmp/plumbing.a" -lm -o test ;;
    test_model) $CC $flags -DMEGALODON_DOUBLE megalodon.c "$tmp/test_model.o" "$tmp/plumbing.a" -lm -o test ;;
    test_chunk_parallel) $CC $flags -DMEGALODON_DOUBLE tests/test_chunk_parallel.c megalodon.c "$tmp/plumbing.a" -lm -o test ;;
    test_float) $CC $flags tests/test_float.c "$tmp/float.a" -lm -o test ;;
    esac > out 2>&1
}

# Sets verdict: "survived", "caught by TEST: CHECK", or "error: ...".
try() { # function
    verdict=survived
    local order="test_layers test_model test_chunk_parallel test_float"
    case $1 in # of what test_layers does not call
    mega* | nffn* | block* | embedding_scale | acts_take | state* | add | mask_of | remember | cache_chunk) order="test_model test_chunk_parallel test_float" ;;
    time_norm* | ema_*) order="test_model test_chunk_parallel" ;;
    *_join* | cema_reduce | power) order="test_chunk_parallel" ;;
    exp_real) order="test_float" ;;
    esac
    for test in $order; do
        if ! build $test; then
            verdict="error: does not compile: $(grep -m 1 error: out)"
            return
        fi
        timeout 100 ./test > out 2>&1 && continue
        local line
        line=$(grep FAIL out | head -n 1 | sed 's/  .*//')
        verdict="caught by $test: ${line:-it crashes}"
        return
    done
}

worker() { # number: every second mutant
    local number=0 line name old new rest
    mkdir -p "$tmp/$1/tests" && cd "$tmp/$1" || exit 1
    cp -r "$root/plumbing" "$root/megalodon.h" .
    cp "$root"/tests/*.[ch] tests/
    while IFS= read -r line; do
        number=$((number + 1))
        [ $((number % 2)) -eq "$1" ] || continue
        name=${line%%: *} rest=${line#*: }
        old=${rest%%  =>*} new=${rest#*=>}
        new=${new#  }
        if mutate "$name" "$old" "$new" "$root/megalodon.c" > megalodon.c; then
            try "$name"
        else
            verdict="error: the text is not there exactly once"
        fi
        case $verdict in caught*) echo "ok    $line   [$verdict]" ;; *) echo "FAIL  $line   [$verdict]" ;; esac
    done < "$tmp/list" | tee "$tmp/result.$1"
}

root=$PWD
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
list | grep -F -e "${1:-}" > "$tmp/list"
mkdir "$tmp/float"
for file in plumbing/*.c; do
    object=$(basename "$file" .c).o
    [ "$object" != compare.o ] || continue
    $CC $flags -DMEGALODON_DOUBLE -c "$file" -o "$tmp/$object" && $CC $flags -c "$file" -o "$tmp/float/$object" || exit 1
done
ar rcs "$tmp/plumbing.a" "$tmp"/*.o && ar rcs "$tmp/float.a" "$tmp"/float/*.o
$CC $flags -DMEGALODON_DOUBLE -c tests/test_model.c -o "$tmp/test_model.o" || exit 1

# first without any mutation: all must pass
mkdir "$tmp/none" && cd "$tmp/none" || exit 1
cp -r "$root/plumbing" "$root/megalodon.h" "$root/megalodon.c" .
mkdir tests && cp "$root"/tests/*.[ch] tests/
try unmutated
cd "$root" || exit 1
if [ "$verdict" != survived ]; then
    echo "FAIL  without a mutation the tests fail already   [$verdict]"
    echo "0 passed, 1 failed"
    exit 1
fi

worker 0 &
worker 1 &
wait
passed=$(cat "$tmp"/result.* | grep -c '^ok')
failed=$(($(wc -l < "$tmp/list") - passed))
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
