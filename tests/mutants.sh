#!/usr/bin/env bash
# Tests the tests: breaks the CPU backend in one place at a time and demands that some test fails. From the root of the
# repository: bash tests/mutants.sh [word]; with a word, only the mutants whose line contains it.
#
# A line of the list is `function: old text  =>  new text`. The function is in one of the files below. The old text must be
# in exactly one line of it. A mutant that cannot be applied or compiled is a failure, too.

files="megalodon.c kernels/matmul_cpu.h kernels/team_cpu.h kernels/matvec_cpu.h kernels/cema_cpu.h plumbing/model.h"

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
matmul_serial: ak = A.transposed ? (size_t)A.ld : 1  =>  ak = A.transposed ? (size_t)M : 1
matmul_serial: a + (size_t)i * depth  =>  a
matvec_write: product + (p->bias ? p->bias[j] : 0)  =>  product
matvec_write: p->residual[at] : 0)  =>  p->residual[j] : 0)
matvec_dot: both = sum[i][0] + sum[i][1]  =>  both = sum[i][0]
matvec_dot: lanes[0] + rest  =>  lanes[0]
matvec_strip: sum[u] += a[k] * y  =>  sum[u] = a[k] * y
matvec_strip: strip[c] += a[k] * b[c]  =>  strip[c] = a[k] * b[c]
matvec_columns: matvec_dot(p, i, j, 1)  =>  matvec_dot(p, i, j, 2)
cema_token_runs: b = i / runs  =>  b = 0
cema_token_runs: q_im[c] * old;  =>  q_im[c] * re[c];
cema_token_runs: memcpy(p->out + (size_t)b * D + d0  =>  memcpy(p->out + (size_t)b * D
team_parts: from = part * team.items  =>  from = 0
team_parts: min(from + team.items, team.job.n)  =>  from + team.items
matmul_init: c[j] += bias[j]  =>  c[j] = bias[j]
matmul_init: residual + (size_t)i * ldc : bias  =>  residual : bias
matmul: matmul_serial(C + at, ldc, add, a  =>  matmul_serial(C + at, ldc, residual != NULL, a
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
mask_query: (uint64_t)b * d.H + h  =>  (uint64_t)h
mask_query: (uint64_t)t * d.C  =>  0
dropout: >> 32 << 16)  =>  >> 32 << 15)
dropout: >= limit  =>  < limit
dropout: inp[at + i] * scale  =>  inp[at + i]
timestep_norm_forward: n += g  =>  n += 1
timestep_norm_forward: (double)g * (double)start.count[b]  =>  (double)start.count[b]
timestep_norm_forward: s2 - s1 * s1 / n  =>  s2
timestep_norm_forward: double from = n > 0 ? m : x[0]  =>  double from = x[0]
timestep_norm_forward: double m = start.mean ? start.mean[b * G + j] : 0, m2 =  =>  float m = start.mean ? start.mean[b * G + j] : 0, m2 =
timestep_norm_forward: double m = start.mean ? start.mean[b * G + j] : 0, m2 =  =>  double m = start.mean ? start.mean[b * G + j] : 0; float m2 =
timestep_norm_forward: start.m2 ? start.m2[b * G + j] : 0  =>  0
timestep_norm_forward: end.m2[b * G + j] = m2  =>  end.m2[b * G + j] = 0
timestep_norm_forward: * (w[i] + 1) + bs[i]  =>  * w[i] + bs[i]
timestep_norm_forward: sqrt(m2 / n + eps)  =>  sqrt(m2 / n)
timestep_norm_backward: dmean = -r * s  =>  dmean = r * s
timestep_norm_backward: V += dvar / n  =>  V += dvar
timestep_norm_backward: W += dvar / n * m  =>  W = dvar / n * m
timestep_norm_backward: dvar = -0.5 * r * r * r * d  =>  dvar = -0.5 * r * r * d
timestep_norm_backward: t--, n -= g  =>  t--
timestep_norm_backward: (w[i] + 1) * dy[i] + shift  =>  w[i] * dy[i] + shift
timestep_norm_backward: + 2 * V * (x[i] - m)  =>
timestep_norm_backward: U - 2 * (W - m * V)  =>  U
timestep_norm_backward: double m = mean[row * G + j], r  =>  float m = mean[row * G + j]; double r
timestep_norm_backward: sums[1] = V, sums[2] = W  =>  sums[1] = V
timestep_norm_backward: count ? (double)g * (double)count[b] : 0  =>  0
timestep_norm_combine: count ? g * (double)count[i / d.G] : 0  =>  0
timestep_norm_combine: if (k == cp->cp_rank)  =>  if (k == 0)
timestep_norm_combine: + delta * delta * n * more / (n + more)  =>
timestep_norm_combine: m += delta * more / (n + more)  =>  m += delta * more / n
timestep_norm_combine: (double)cp->lengths[k]  =>  (double)cp->lengths[0]
timestep_norm_combine: end.mean[i] = m  =>  end.mean[i] = start.mean[i]
timestep_norm_combine_backward: if (k == cp->cp_rank)  =>  if (k == 0)
timestep_norm_combine_backward: double sum = dstate[i]  =>  double sum = 0
timestep_norm_combine_backward: if (end) end[i] = sum  =>  if (end) end[i] = dstate[i]
timestep_norm_layer_backward: dstate->sums + layer * sums : NULL  =>  dstate->sums : NULL
timestep_norm_layer_backward: later = combined(m, whole, sums * sizeof *later)  =>  later = combined(m, NULL, sums * sizeof *later)
timestep_norm_layer_backward: timestep_norm_combine_backward(later, whole, all  =>  timestep_norm_combine_backward(later, NULL, all
cema_layer_backward: dstate->h + layer * modes : NULL  =>  dstate->h : NULL
cema_layer_backward: cema_combine(dh, whole, all  =>  cema_combine(dh, NULL, all
mega_backward: s->dxt, dstate, s->dema  =>  s->dxt, NULL, s->dema
megalodon_backward: m->grads.final_norm_bias, dstate, s->dxt  =>  m->grads.final_norm_bias, NULL, s->dxt
cema_reduce: L - 1 - t0 - t  =>  t0 + t
cema_reduce: q_re * c.g_im[u] + q_im * c.g_re[u]  =>  q_re * c.g_im[u]
cema_reduce: q_im = -q_im  =>  q_im = q_im
power: n > 0; n /= 2  =>  n > 1; n /= 2
cema_combine: if (backward) q = conj(q)  =>
cema_combine: backward ? size - 1 - i : i  =>  i
cema_combine: cp->lengths[k] != length  =>  length == 0
cema_combine: if (k == cp->cp_rank)  =>  if (k == 0)
cema_combine: decay * sum  =>  sum
cema_combine: end[im] = (real)cimag(sum)  =>  end[im] = 0
timestep_norm_layer_forward: all, end.count, &m->cp  =>  all, NULL, &m->cp
timestep_norm_layer_forward: end.mean = end.m2 = NULL  =>  (void)0
cema_layer_forward: h_out = NULL  =>  (void)0
megalodon_chunk_parallel: m->cp_start += r < cp->cp_rank  =>  m->cp_start += r <= cp->cp_rank
megalodon_update: m->memory[PARAMS] + m->shards[s].first  =>  m->memory[PARAMS]
megalodon_update: m->memory[GRADS] + m->shards[s].first  =>  m->memory[GRADS]
megalodon_grad_norm: m->memory[GRADS] + m->shards[s].first  =>  m->memory[GRADS]
megalodon_update: m1 += n, v += n  =>  m1 += n
buffer_copy: src + (from - first)  =>  src
buffer_copy: at += held[s++].count  =>  s++
megalodon_backward: m->on_grad_ready(m, l + 1)  =>  m->on_grad_ready(m, l)
megalodon_backward: if (m->on_grad_ready) m->on_grad_ready(m, 0)  =>
mask_of: (uint64_t)(m->dropout_key.start + m->cp_start)  =>  (uint64_t)m->dropout_key.start
mask_of: (uint64_t)(m->dropout_key.start + m->cp_start)  =>  (uint64_t)m->cp_start
mask_of: length = (uint64_t)m->dropout_key.length  =>  length = 0
mask_of: ? (uint64_t)m->cp_length :  =>  ? (uint64_t)m->dims.L :
mask_of_attention: num_heads - 1)  =>  num_heads)
cema_coeffs_forward: 2 * PI * (n + 1) / N  =>  2 * PI * n / N
cema_coeffs_forward: (1 - a * b) * sin(phi)  =>  (1 - a) * sin(phi)
cema_coeffs_forward: gamma[2 * in] / sqrt(N)  =>  gamma[2 * in] / N
cema_coeffs_backward: dc->p[out] - b * dabs  =>  dc->p[out] + b * dabs
cema_coeffs_backward: -a * dabs * b  =>  a * dabs * b
cema_coeffs_backward: dangle * angle * (1 - angle)  =>  dangle * angle
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
cema_backward: later[n][u] = l_re, later[N + n][u] = l_im  =>  later[n][u] = l_re
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
linear_forward: out, M, residual  =>  out, M, NULL
linear_backward_input: add ? dinp : NULL  =>  NULL
linear_backward_weight: dweight, K, dweight  =>  dweight, K, NULL
linear_backward_weight: if (dbias)  =>  if (0)
qk_forward: (gamma[c] + 1) * scale  =>  gamma[c] * scale
qk_forward: (gamma[Z + c] + 1) * scale  =>  (gamma[c] + 1) * scale
qk_forward: beta[Z + c]  =>  beta[c]
qk_backward: (gamma[c] + 1) + dk  =>  (gamma[c] + 1) - dk
qk_backward: (real)sum[0][c] * scale  =>  (real)sum[0][c]
qk_backward: sum[3][c] += dk  =>  sum[3][c] += dq
rope_table: -2.0 * j / dz  =>  -1.0 * j / dz
rope_rotate: (count ? count[b] : 0) + t  =>  t
rope_rotate: (count ? count[b] : 0) + t  =>  (count ? count[0] : 0) + t
rope_rotate: re * angle[0] - im * s  =>  re * angle[0] + im * s
rope_backward: count, -1, d  =>  count, 1, d
silu_forward: inp[i] * sigmoid(inp[i])  =>  sigmoid(inp[i])
silu_backward: 1 + inp[i] * (1 - s)  =>  1 + inp[i]
gate_forward: a[i] * (b[i] * sigmoid(b[i]))  =>  a[i] * sigmoid(b[i])
gate_forward: a[i] * (b[i] * sigmoid(b[i]))  =>  a[i] * b[i] * sigmoid(b[i])
gate_backward: 1 + b[i] * (1 - s)  =>  1 - b[i] * (1 - s)
gate_backward: dy * (b[i] * s)  =>  dy * s
attention_chunk_forward: nk - nq + i + 1;  =>  nk - nq + i + (i > 0);
attention_chunk_forward: nk - nq + i + 1;  =>  nk - nq + i + 1 + (i < nq - 1);
attention_chunk_forward: j < nk; j++) s[j] = 0  =>  j < nk; j++) s[j] = 1e-3
attention_chunk_forward: mask_row(tile->mask, i, d.C)  =>  tile->mask
attention_chunk_backward: dropout(ds, ds, mask_row(tile->mask, i, d.C)  =>  dropout(ds, ds, tile->mask
attention_chunk_backward: dropout(s, s, mask_row(tile->mask, i, d.C)  =>  dropout(s, s, tile->mask
attention_chunk_backward: add ? dk : NULL  =>  NULL
attention_chunk_backward: add ? dv : NULL  =>  NULL
cache_chunk: (size_t)b * d.L + t  =>  (size_t)b * d.L
cache_chunk: (size_t)b * d.C + at  =>  (size_t)b * d.C
attention_forward: cached = before > 0 && chunk == 0  =>  cached = before > 0
attention_forward: (cached ? before : 0) + t - from  =>  t - from
attention_forward: ceil_div(L - 1, C) + 1 : ceil_div  =>  ceil_div(L, C) : ceil_div
attention_forward: before == 0 || before + L > C  =>  before + L > C
attention_forward: mask_query(mask, b, h, t, d)  =>  mask_query(mask, b, h, 0, d)
attention_backward: int n = min(C, L - t0)  =>  int n = L - t0 < C ? 1 : C
attention_backward: i < last,  =>  1,
attention_backward: i < last,  =>  0,
attention_backward: b, h, t0 + i, d)  =>  b, h, t0, d)
attention_chunk_forward: largest + (real)log(sum)  =>  (real)log(sum)
attention_chunk_forward: s[j] /= sum  =>  s[j] /= 1
attention_chunk_forward: sum += overflow  =>
attention_chunk_backward: s[j] /= sum  =>  s[j] /= 1
attention_chunk_backward: ds[j] - dot  =>  ds[j]
attention_chunk_backward: s[j] - l)  =>  s[j])
attention_chunk_backward: s[j] = ds[j] = 0  =>  s[j] = 0
attention_forward: int before = past ? past[b] : 0, cached  =>  int before = 0, cached
layernorm_forward: double m = sum / D  =>  double m = 0
layernorm_forward: double sum = 0, squares = 0  =>  real sum = 0, squares = 0
layernorm_forward: (bias ? bias[c] : 0)  =>  0
layernorm_backward: a[c] - sum - n * dot  =>  a[c] - n * dot
layernorm_backward: a[c] - sum - n * dot  =>  a[c] - sum
layernorm_backward: a[c] * (real)((x[c] - m) * s)  =>  a[c] * (real)(x[c] - m) * (real)s
layernorm_backward: sum_rows(dbias  =>  if (0) sum_rows(dbias
rescale_backward: = alpha[c] * dout  =>  = dout
add: out[i] += inp[i]  =>  out[i] = inp[i]
output_loss: losses[r0 + r] = target < 0 ? 0 :  =>  losses[r0 + r] =
output_loss: target < 0 ? 0 : (real)(grad_scale / sum)  =>  (real)(grad_scale / sum)
output_loss: (real)(grad_scale / sum)  =>  (real)(1 / sum)
output_loss: l[target] = (real)dtarget  =>  l[target] -= 0
output_loss: grad_scale * (l[target] - sum) / sum  =>  (real)(grad_scale * l[target] / sum) - grad_scale
output_loss: log(sum) + (largest - at_target)  =>  log(sum) + largest - at_target
output_loss: sum += overflow  =>
output_loss: *xr = x + (size_t)r0 * D  =>  *xr = x
output_loss: dx + (size_t)r0 * D, 0  =>  dx + (size_t)r0 * D, 1
cema_layer_forward: out->h + at : NULL  =>  out->h : NULL
mega_forward: dropout(a->mx, a->mx  =>  dropout(s->dmx, a->mx
mega_forward: DROP_GATED, c->hidden_dropout  =>  DROP_GATED, c->dropout
mega_forward: add(a->y, x  =>  add(a->y, a->y
mask_of: m->dropout_on ? p : 0  =>  p
mask_of: mask.step = (uint32_t)m->dropout_key.step  =>  mask.step = 0
mask_of: (uint64_t)m->dropout_key.row *  =>  0 *
mega_backward: const real *dsum = mega_mask.p > 0 ? s->dxt : dy  =>  const real *dsum = dy
linear_gate_backward: dropout(da, da, mask  =>  dropout(da, da, (Mask){.p = 0}
linear_gate_backward: dropout(out, out, mask  =>  dropout(out, out, (Mask){.p = 0}
linear_gate_backward: if (dbias) sum_rows  =>  if (0) sum_rows
mega_backward: s->dr_pre, dw->wr_bias, dsum  =>  s->dr_pre, NULL, dsum
mega_backward: dropout(s->dmx, s->dmx,  =>  dropout(s->v, s->v,
timestep_norm_layer_backward: m->has_before ? m->before.count : NULL  =>  NULL
nffn_forward: add(out, x  =>  add(out, a->y
nffn_forward: dropout(f2, f2  =>  dropout(a->u, a->u
nffn_backward: if (nffn_mask.p > 0) df2  =>  if (nffn_mask.p > 1) df2
linear_silu_backward: dropout(dpre, dpre, mask  =>  dropout(dpre, dpre, (Mask){.p = 0}
linear_silu_backward: dropout(out, out, mask  =>  dropout(out, out, (Mask){.p = 0}
keep_state: memory_copy(s->memory, state->memory, s->bytes)  =>  memory_copy(s->memory, state->memory, 8)
keep_state: m->has_before = state != NULL ||  =>  m->has_before =
megalodon_forward: dropout(m->x[0], m->x[0]  =>  dropout(m->x[1], m->x[0]
megalodon_backward: dropout(s->dx, s->dx  =>  dropout(s->dy, s->dx
begin_forward: m->before.count[b] += m->cp_start  =>  m->before.count[b] += 0
block_again: m->has_before ? &m->before : NULL  =>  NULL
megalodon_activation: block_again(m, layer)  =>
megalodon_zero_grad: i < m->num_params  =>  i < 1
state_reset: s->count + row  =>  s->count
state_reset: s->mean + i * s->G  =>  s->mean + i
state_reset: s->h + i * s->modes  =>  s->h + i
mega_forward: linear_silu_forward(s->v, a->v_pre, a->xt  =>  linear_silu_forward(s->v, a->v_pre, a->mx
linear_silu_forward: silu_forward(out, pre  =>  silu_forward(out, inp
mega_forward: linear_forward(a->r_pre, NULL, a->mx  =>  linear_forward(a->r_pre, NULL, a->xt
mega_forward: m->rope, in ? in->count : NULL  =>  m->rope, NULL
mega_backward: linear_backward(s->dmx, 1, dw->wr  =>  linear_backward(s->dmx, 0, dw->wr
mega_backward: linear_backward(s->dxt, 1, dw->wv  =>  linear_backward(s->dxt, 0, dw->wv
qk_layer_backward: rope_backward(dk, dk  =>  rope_backward(dk, dq
mega_backward: silu_bias_backward(s->dv, dw->wv_bias, s->dv, a->v_pre  =>  silu_bias_backward(s->dv, dw->wv_bias, s->dv, a->r_pre
silu_bias_backward: sum_rows(dbias  =>  if (0) sum_rows(dbias
mega_backward: residuals[2] = {dy, residual}  =>  residuals[2] = {NULL, residual}
nffn_forward: gate_forward(s->hidden, a->f3, a->f1  =>  gate_forward(s->hidden, a->f1, a->f3
nffn_backward: linear_backward(du, c->swiglu  =>  linear_backward(du, 0
block_forward: m->acts_layer = layer  =>  m->acts_layer = 0
block_again: m->acts_layer == layer  =>  m->acts_layer >= 0
block_forward: m->config.two_hop == ONE_HOP  =>  m->config.two_hop == TWO_HOPS
block_backward: if (one_hop) add(s->dy  =>  if (!one_hop) add(s->dy
block_backward: one_hop ? NULL : s->dx  =>  NULL
key_width: ? sqrt(dz) : dz  =>  ? dz : dz
qk_layer_backward: standard ? z : zn  =>  zn
timestep_norm_layer_forward: m->config.timestep_norm == NORM_LAYER  =>  0
layer_instead_of_timestep_backward: add(dx, residuals[0], n)  =>  (void)0
layer_instead_of_timestep_backward: copy(dx, residuals[0], n)  =>  (void)0
cema_layer_backward: copy(dx, dy  =>  copy(dx, a->xt
cema_coeffs_forward: kind == CEMA_REAL ? 0 : 2 * PI  =>  2 * PI
cema_coeffs_backward: kind == CEMA_REAL ? 0 : 1 /  =>  1 /
embedding_scale: sqrt(c->model_dim)  =>  1
megalodon_forward: parallel ? m->cp_length : L  =>  parallel ? m->cp_length : 1
megalodon_forward: parallel ? m->cp_length : L  =>  L
megalodon_forward: b < B; b++) state->count  =>  b < 1; b++) state->count
norm_state: (size_t)layer * s->B * s->G  =>  0 * (size_t)layer * s->B * s->G
megalodon_loss: targets[r] >= 0  =>  targets[r] >= -1
megalodon_backward: embedding_scale(c)  =>  1
megalodon_logits: m->final + first * m->dims.D  =>  m->final
megalodon_grad_norm: total += m->sums[p]  =>  total = m->sums[p]
megalodon_grad_norm: return sqrt(total)  =>  return total
megalodon_update: k = (double)update + 1  =>  k = (double)update + 2
megalodon_update: 1 / (1 - pow(o->beta1, k))  =>  1
megalodon_update: 1 / sqrt(1 - pow(o->beta2, k))  =>  1
megalodon_update: 1 - lr * o->weight_decay  =>  1 - o->weight_decay
megalodon_update: rest2 * g * g  =>  rest2 * g
megalodon_update: grad[i] * scale  =>  grad[i]
megalodon_update: root + eps  =>  root
megalodon_update: + (v[i] - v[i])  =>
megalodon_update: m->coeffs_valid = 0  =>  m->coeffs_valid = 1
take_acts: m->mode != MEGALODON_TRAIN) arena  =>  m->mode != MEGALODON_TRAIN + 9) arena
take_acts: m->mode != MEGALODON_INFER || l < 2  =>  l < 2
megalodon_write: m->coeffs_valid = 0  =>  m->coeffs_valid = 1
state_read: (char *)s->memory + first  =>  (char *)s->memory
state_write: (char *)s->memory + first  =>  (char *)s->memory
residual_sum: a[at + i] + b[at + i]  =>  a[at + i]
timestep_norm_backward: residual_sum(dx, residuals, at, g)  =>  residual_sum(dx, NULL, at, g)
timestep_norm_backward: if (dstate) memcpy(sums, dstate  =>  if (0) memcpy(sums, dstate
timestep_norm_reduce_backward: memset(dstate, 0  =>  memset(dstate, 64
normalized_gradient: weight[c] + 1  =>  weight[c]
qk_layer_forward: rope_forward(k, k  =>  rope_forward(k, q
silu_backward: if (out)  =>  if (0)
gate_backward: if (out)  =>  if (0)
attention_chunk_backward: dot += s[j] * ds[j]  =>  dot += ds[j]
attention_chunk_backward: dot /= sum  =>  dot /= 1
attention_backward: dscores = scores + (size_t)threads * QUERY_TILE * C  =>  dscores = scores
read_past: (int)(counts[b] % m->dims.C)  =>  0
read_past: (int)(counts[b] % m->dims.C)  =>  (int)counts[b]
cema_layer_backward: dh = combined(m, whole, modes  =>  dh = combined(m, NULL, modes
combined: memory_clear(memory, bytes)  =>  (void)0
combined: memory_copy(memory, start, bytes)  =>  (void)0
mega_forward: if (!residual) add(a->y, x  =>  if (0) add(a->y, x
nffn_forward: if (!residual) add(out, x  =>  if (0) add(out, x
nffn_forward: mask.p > 0 || c->rescale_nffn ? NULL : x  =>  mask.p > 0 ? NULL : x
mega_backward: linear_backward_weight(dw->wh2  =>  if (0) linear_backward_weight(dw->wh2
END
}

# Prints a file with the mutation. Fails unless the old text is in exactly one line of the function.
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

# test_layers also checks the threads of decoding, which need OpenMP.
build() { # test, in a copy of the sources
    case $1 in
    test_layers) $CC $flags -fopenmp -DMEGALODON_DOUBLE tests/test_layers.c "$tmp/plumbing.a" -lm -o test ;;
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
    mega* | nffn* | block* | embedding_scale | take_acts | state* | norm_state | add | mask_of | keep_state | begin_forward | read_past | cache_chunk | buffer_copy)
        order="test_model test_chunk_parallel test_float" ;;
    *_layer_*) order="test_layers test_model test_chunk_parallel" ;;
    *_combine* | *_reduce* | power) order="test_chunk_parallel" ;;
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

# Copies what the tests are built from into the present folder.
copy_sources() {
    mkdir -p tests kernels && cp "$root"/tests/*.[ch] tests/ && cp "$root"/kernels/*_cpu.h kernels/ &&
        cp -r "$root/plumbing" "$root/megalodon.h" "$root/megalodon.c" .
}

worker() { # number: every second mutant
    local number=0 line name old new rest file mutated
    mkdir -p "$tmp/$1" && cd "$tmp/$1" && copy_sources || exit 1
    while IFS= read -r line; do
        number=$((number + 1))
        [ $((number % 2)) -eq "$1" ] || continue
        name=${line%%: *} rest=${line#*: }
        old=${rest%%  =>*} new=${rest#*=>}
        new=${new#  }
        mutated=
        for file in $files; do
            mutate "$name" "$old" "$new" "$root/$file" > "$file" && mutated=$file && break
            cp "$root/$file" "$file"
        done
        if [ -n "$mutated" ]; then
            try "$name"
            cp "$root/$mutated" "$mutated"
        else
            verdict="error: the text is not in exactly one line of the function"
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
mkdir "$tmp/none" && cd "$tmp/none" && copy_sources || exit 1
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
