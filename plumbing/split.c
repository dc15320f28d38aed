// How a sequence is divided: into consecutive segments, and each segment among the chunk-parallel ranks.
#include "plumbing.h"

Split split_none(int64_t length, int chunk_size) {
    return (Split){.length = length, .segment_len = length, .chunk_size = chunk_size, .cp_size = 1};
}

int64_t split_segments(const Split *s) { return (s->length - 1) / s->segment_len + 1; }

// Index of rank r's first chunk in a segment of K chunks. Each of n ranks has K / n chunks, and the last K % n ranks have
// one more. So a shorter segment gives no rank more chunks than a full one, for which models are allocated.
static int64_t first_chunk(int64_t K, int n, int r) {
    const int64_t smaller = n - K % n; // ranks with K / n chunks
    return r * (K / n) + (r > smaller ? r - smaller : 0);
}

TokenRange split_part(const Split *s, int64_t segment, int r) {
    const int64_t start = segment * s->segment_len, left = s->length - start;
    const int64_t count = left < s->segment_len ? left : s->segment_len, C = s->chunk_size,
                  chunks = (count - 1) / C + 1;
    const int64_t from = first_chunk(chunks, s->cp_size, r) * C, to = first_chunk(chunks, s->cp_size, r + 1) * C;
    return (TokenRange){start + from, (to < count ? to : count) - from};
}

// All segments before another one have the full length.
int64_t split_offset(const Split *s, int64_t segment) { return segment * split_part(s, 0, s->cp_rank).count; }

int64_t split_own(const Split *s) {
    const int64_t last = split_segments(s) - 1;
    return split_offset(s, last) + split_part(s, last, s->cp_rank).count;
}

const char *split_error(const Split *s) {
    static char text[200];
    const long long L = s->length, N = s->segment_len, C = s->chunk_size;
    const long long last = L - (split_segments(s) - 1) * N, last_chunks = (last - 1) / C + 1;
    if (N >= L) return NULL;
    if (N % C != 0)
        snprintf(text, sizeof text, "--segment-len %lld is no multiple of --chunk-size %lld", N, C);
    else if (N / C < s->cp_size)
        snprintf(text, sizeof text,
                 "--segment-len %lld has %lld chunk%s of %lld tokens; each of %d chunk-parallel ranks needs one", N,
                 N / C, N > C ? "s" : "", C, s->cp_size);
    else if (last_chunks < s->cp_size)
        snprintf(
            text, sizeof text,
            "--segment-len %lld leaves a last segment of %lld chunk%s of --seq-len %lld; each of %d chunk-parallel "
            "ranks needs one",
            N, last_chunks, last > C ? "s" : "", L, s->cp_size);
    else
        return NULL;
    return text;
}
