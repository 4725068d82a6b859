/* The passes of encoders: attention of short segments both ways, layer norm, dropout by row. Part of kernels.c. */
#ifndef T
#include <omp.h>

/* 16 floats that the compiler keeps in one register, or in as many as the processor needs. */
typedef float lanes __attribute__((vector_size(64)));
static inline lanes load_lanes(const float *x) { lanes y; memcpy(&y, x, 64); return y; }

/* C = A B, or C += A B, in float: A (m, n) at a[i * ai + j * aj], B (n, w) with rows of `w` floats, C (m, w) likewise. m is read and
 * written in eights, w is a multiple of 16; what is padding costs time and is never looked at. */
static inline void small_product(
    const float *a, int64_t ai, int64_t aj, const float *b, float *c, int64_t m, int64_t n, int64_t w, int add) {
    for (int64_t i = 0; i < m; i += 8)
        for (int64_t l = 0; l < w; l += 16) {
            lanes sum[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) sum[r] = add ? load_lanes(c + (i + r) * w + l) : (lanes){0};
            for (int64_t j = 0; j < n; j++) {
                lanes row = load_lanes(b + j * w + l);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) sum[r] += a[(i + r) * ai + j * aj] * row;
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) memcpy(c + (i + r) * w + l, &sum[r], 64);
        }
}

/* 32 random bits for element `at` of what (low, high) name: the finaliser of MurmurHash3 twice. noise.py has the same in torch. */
static inline uint32_t drawn(uint32_t at, uint32_t low, uint32_t high) {
    uint32_t h = at * 0x9E3779B1u + low;
    h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u; h ^= h >> 16;
    h ^= high;
    h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u; h ^= h >> 16;
    return h;
}
#else

/* y = (h - mean) / deviation * weight + bias with h = x + more, rounded to T and kept in `sum`; without `more` (sum == x) h is x. */
void F(layer_norm)(
    const T *x, const T *more, const T *weight, const T *bias, T *sum, T *y, float *mean, float *inverse, float epsilon, int64_t rows,
    int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = x + i * width, *other = more + i * width;
        T *h = sum + i * width, *out = y + i * width;
        float total = 0.0f, square = 0.0f;
        if (sum != x) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) h[j] = PUT(GET(in[j]) + GET(other[j]));
        }
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < width; j++) total += GET(h[j]);
        float middle = total / (float)width;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < width; j++) { float v = GET(h[j]) - middle; square += v * v; }
        float r = 1.0f / sqrtf(square / (float)width + epsilon);
        mean[i] = middle;
        inverse[i] = r;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = PUT((GET(h[j]) - middle) * r * GET(weight[j]) + GET(bias[j]));
    }
}

void F(layer_norm_backward)(
    const T *h, const T *weight, const T *grad, const float *mean, const float *inverse, T *dh, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = h + i * width, *g = grad + i * width;
        T *out = dh + i * width;
        float m = mean[i], r = inverse[i], plain = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : plain, dot)
        for (int64_t j = 0; j < width; j++) {
            float v = GET(g[j]) * GET(weight[j]);
            plain += v;
            dot += v * (GET(in[j]) - m) * r;
        }
        plain /= (float)width;
        dot /= (float)width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++)
            out[j] = PUT(r * (GET(g[j]) * GET(weight[j]) - plain - (GET(in[j]) - m) * r * dot));
    }
}

/* Gradients of weight and bias: sums over rows, a block of columns by one thread. */
void F(layer_norm_weights)(
    const T *h, const T *grad, const float *mean, const float *inverse, float *dweight, float *dbias, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < width; first += 64) {
        int64_t last = first + 64 < width ? first + 64 : width;
        for (int64_t j = first; j < last; j++) dweight[j] = dbias[j] = 0.0f;
        for (int64_t i = 0; i < rows; i++) {
            float m = mean[i], r = inverse[i];
#pragma omp simd
            for (int64_t j = first; j < last; j++) {
                float g = GET(grad[i * width + j]);
                dweight[j] += g * (GET(h[i * width + j]) - m) * r;
                dbias[j] += g;
            }
        }
    }
}

/* Sums over rows of x (rows, width): what a bias gets of a gradient. */
void F(column_sums)(const T *x, float *sums, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < width; first += 64) {
        int64_t last = first + 64 < width ? first + 64 : width;
        for (int64_t j = first; j < last; j++) sums[j] = 0.0f;
        for (int64_t i = 0; i < rows; i++) {
#pragma omp simd
            for (int64_t j = first; j < last; j++) sums[j] += GET(x[i * width + j]);
        }
    }
}

/* Inverted dropout: element j of row i stays, times `scale`, where the upper 24 bits drawn for its place (place[i] * width + j of what
 * keys[2 i], keys[2 i + 1] name) are `least` or more. A row with place < 0 is copied. */
void F(row_dropout)(
    const T *x, T *y, const int64_t *keys, const int64_t *place, float scale, int64_t least, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = x + i * width;
        T *out = y + i * width;
        uint32_t low = (uint32_t)keys[2 * i], high = (uint32_t)keys[2 * i + 1], first = (uint32_t)(place[i] * width);
        uint32_t limit = place[i] < 0 ? 0u : (uint32_t)least;
        float factor = place[i] < 0 ? 1.0f : scale;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            uint32_t h = drawn(first + (uint32_t)j, low, high) >> 8;
            out[j] = PUT(h >= limit ? GET(in[j]) * factor : 0.0f);
        }
    }
}

/* Attention of every token of a segment to every other, in float, nothing of it kept. `qkv` holds rows of `stride` elements: heads of
 * queries, then kv_heads of keys, then of values, `dim` numbers each; `edges` (segments + 1) says where segments begin. One thread
 * does a segment and a key head with all query heads that share it. `scratch` has `room` floats for each of `threads`. Queries go
 * through in blocks of 64. */
#define BLOCK 64
static inline void F(read_heads)(const T *x, int64_t stride, float *y, int64_t rows, int64_t padded, int64_t dim, int64_t wide) {
    for (int64_t i = 0; i < padded; i++) {
#pragma omp simd
        for (int64_t j = 0; j < wide; j++) y[i * wide + j] = i < rows && j < dim ? GET(x[i * stride + j]) : 0.0f;
    }
}
static inline void F(turn)(const float *x, float *y, int64_t rows, int64_t columns, int64_t wide) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) y[j * rows + i] = x[i * wide + j];
}
static inline void F(soften)(float *scores, float scale, int64_t rows, int64_t n, int64_t padded) {
    for (int64_t i = 0; i < rows; i++) {
        float *row = scores + i * padded, top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) { row[j] *= scale; top = row[j] > top ? row[j] : top; }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) { row[j] = fast_exp(row[j] - top); sum += row[j]; }
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) row[j] *= inverse;
        for (int64_t j = n; j < padded; j++) row[j] = 0.0f;
    }
}

void F(attend_both_ways)(
    const T *qkv, T *out, const int64_t *edges, float *scratch, float scale, int64_t segments, int64_t heads, int64_t kv_heads,
    int64_t dim, int64_t room, int64_t threads) {
    int64_t stride = (heads + 2 * kv_heads) * dim, group = heads / kv_heads, wide = (dim + 15) / 16 * 16;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < segments * kv_heads; item++) {
        int64_t start = edges[item / kv_heads], n = edges[item / kv_heads + 1] - start, padded = (n + 15) / 16 * 16;
        const T *q = qkv + start * stride, *k = q + (heads + item % kv_heads) * dim, *v = k + kv_heads * dim;
        float *own = scratch + omp_get_thread_num() * room, *other = own + padded * wide, *keys = other + padded * wide;
        float *values = keys + padded * wide, *scores = values + padded * wide, *mixed = scores + BLOCK * padded;
        F(read_heads)(k, stride, own, n, padded, dim, wide);
        F(turn)(own, keys, padded, dim, wide);
        F(read_heads)(v, stride, values, n, padded, dim, wide);
        for (int64_t g = 0; g < group; g++) {
            int64_t head = item % kv_heads * group + g;
            F(read_heads)(q + head * dim, stride, own, n, padded, dim, wide);
            for (int64_t first = 0; first < n; first += BLOCK) {
                int64_t rows = n - first < BLOCK ? n - first : BLOCK;
                small_product(own + first * wide, wide, 1, keys, scores, rows, dim, padded, 0);
                F(soften)(scores, scale, rows, n, padded);
                small_product(scores, padded, 1, values, mixed, rows, n, wide, 0);
                for (int64_t i = 0; i < rows; i++) {
                    T *to = out + ((start + first + i) * heads + head) * dim;
#pragma omp simd
                    for (int64_t j = 0; j < dim; j++) to[j] = PUT(mixed[i * wide + j]);
                }
            }
        }
    }
}

/* Its gradients, laid out like qkv. With P = softmax(scale q k^T), made again: dV = P^T dO, dP = dO V^T,
 * dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q. */
void F(attend_both_ways_backward)(
    const T *qkv, const T *grad, T *dqkv, const int64_t *edges, float *scratch, float scale, int64_t segments, int64_t heads,
    int64_t kv_heads, int64_t dim, int64_t room, int64_t threads) {
    int64_t stride = (heads + 2 * kv_heads) * dim, group = heads / kv_heads, wide = (dim + 15) / 16 * 16;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < segments * kv_heads; item++) {
        int64_t start = edges[item / kv_heads], n = edges[item / kv_heads + 1] - start, padded = (n + 15) / 16 * 16;
        int64_t block = padded * wide, key = (heads + item % kv_heads) * dim, value = key + kv_heads * dim;
        const T *from = qkv + start * stride;
        T *to = dqkv + start * stride;
        float *q = scratch + omp_get_thread_num() * room, *k = q + block, *up = k + block, *keys = up + block;
        float *values = keys + block, *dk = values + block, *dv = dk + block, *p = dv + block;
        float *ds = p + BLOCK * padded, *dq = ds + BLOCK * padded;
        F(read_heads)(from + value, stride, k, n, padded, dim, wide);
        F(turn)(k, values, padded, dim, wide);
        F(read_heads)(from + key, stride, k, n, padded, dim, wide);
        F(turn)(k, keys, padded, dim, wide);
        memset(dk, 0, 2 * block * sizeof(float));
        for (int64_t g = 0; g < group; g++) {
            int64_t head = item % kv_heads * group + g;
            F(read_heads)(from + head * dim, stride, q, n, padded, dim, wide);
            F(read_heads)(grad + (start * heads + head) * dim, heads * dim, up, n, padded, dim, wide);
            for (int64_t first = 0; first < n; first += BLOCK) {
                int64_t rows = n - first < BLOCK ? n - first : BLOCK;
                const float *asked = q + first * wide, *over = up + first * wide;
                small_product(asked, wide, 1, keys, p, rows, dim, padded, 0);
                F(soften)(p, scale, rows, n, padded);
                small_product(p, 1, padded, over, dv, padded, rows, wide, 1);
                small_product(over, wide, 1, values, ds, rows, dim, padded, 0);
                for (int64_t i = 0; i < rows; i++) {
                    float *d = ds + i * padded, dot = 0.0f;
                    const float *w = p + i * padded;
#pragma omp simd reduction(+ : dot)
                    for (int64_t j = 0; j < padded; j++) dot += w[j] * d[j];
#pragma omp simd
                    for (int64_t j = 0; j < padded; j++) d[j] = scale * w[j] * (d[j] - dot);
                }
                small_product(ds, padded, 1, k, dq, rows, n, wide, 0);
                small_product(ds, 1, padded, asked, dk, padded, rows, wide, 1);
                for (int64_t i = 0; i < rows; i++) {
                    T *row = to + (first + i) * stride + head * dim;
#pragma omp simd
                    for (int64_t j = 0; j < dim; j++) row[j] = PUT(dq[i * wide + j]);
                }
            }
        }
        for (int64_t i = 0; i < n; i++) {
            T *row = to + i * stride;
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) { row[key + j] = PUT(dk[i * wide + j]); row[value + j] = PUT(dv[i * wide + j]); }
        }
    }
}
#undef BLOCK
#endif
