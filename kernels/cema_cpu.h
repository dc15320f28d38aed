/*
cema_cpu.h: CEMA of one token, as in decoding; cema_forward of megalodon.c says what it computes. megalodon.c includes
this file.

cema_forward keeps a strip of channels in registers over many tokens. With one token there is nothing to keep: the time
is that of reading h and the coefficients, 7 rows of D numbers for each mode. Strips would read 64 bytes of each row,
which is slow, since only longer runs are prefetched. So a part is RUN channels, mode by mode, and the threads divide
these parts among them (team_cpu.h).
*/
#pragma once

enum { RUN = 128 };

typedef struct {
    real *out, *h; // out, inp (B,D); h (B,2,N,D) is updated
    const real *inp, *omega;
    const Coeffs *coeffs;
    int B, D, N;
} CemaToken;

// Runs `from` to `end` - 1 of the B*ceil(D/RUN).
static void cema_token_runs(const void *arguments, int from, int end) {
    const CemaToken *p = arguments;
    int D = p->D, N = p->N, runs = ceil_div(D, RUN);
    for (int i = from; i < end; i++) {
        int b = i / runs, d0 = i % runs * RUN, width = min(RUN, D - d0);
        real y[RUN];
        const real *x = p->inp + (size_t)b * D + d0;
        for (int c = 0; c < width; c++) y[c] = p->omega[d0 + c] * x[c];
        for (int n = 0; n < N; n++) {
            size_t at = (size_t)n * coeffs_stride(D) + d0;
            const real *q_re = p->coeffs->q_re + at, *q_im = p->coeffs->q_im + at, *p_re = p->coeffs->p + at;
            const real *g_re = p->coeffs->g_re + at, *g_im = p->coeffs->g_im + at;
            real *re = p->h + ((size_t)b * 2 * N + n) * D + d0, *im = re + (size_t)N * D;
#pragma omp simd
            for (int c = 0; c < width; c++) {
                // h = q h + p x,    y += Re(g h)
                real old = re[c];
                re[c] = q_re[c] * old - q_im[c] * im[c] + p_re[c] * x[c];
                im[c] = q_re[c] * im[c] + q_im[c] * old;
                y[c] += g_re[c] * re[c] - g_im[c] * im[c];
            }
        }
        memcpy(p->out + (size_t)b * D + d0, y, (size_t)width * sizeof *y);
    }
}

static void cema_token(const CemaToken *p) {
    double bytes = 9.0 * p->B * p->N * p->D * sizeof(real); // h is written, too
    team_share((Job){cema_token_runs, p, p->B * ceil_div(p->D, RUN)}, 1, bytes);
}
