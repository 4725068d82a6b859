/* The element-wise passes of a transformer's training step, fused, for CPUs.
 *
 * Matrix products are left to torch (oneDNN, AMX). Between them eager torch makes five to ten passes over each activation, in
 * fp32, on one core each; these functions make one, vectorised by the compiler, rows shared out over OpenMP threads. Each row is
 * reduced by one thread in a fixed order, so results do not depend on the number of threads.
 *
 * This file, and kernels_encoder.c with it, is compiled twice into one library: T = float and T = bf16 (stored as uint16_t, computed in float). kernels.py binds
 * them and tries some at start; tests/models/test_kernels.py compares every one, backward passes too, with its formula in torch.
 */
#ifndef T
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float get_f32(float x) { return x; }
static inline float put_f32(float x) { return x; }
static inline float get_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }
static inline uint16_t put_bf16(float x) { /* round to nearest even; NaN stays NaN because exponent and mantissa top bits stay set */
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
/* exp with about 1e-7 relative error: 2^n * p(r), |r| <= ln2/2; NaN in, NaN out; below -87 it is 0 to within 1e-38. */
static inline float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    float clamped = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float scale = bits_to_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * scale;
}

/* fp32 -> bf16, up or down at random in proportion to what is cut off, so that the mean is x. The random bits are a hash of place
 * and seed (the finaliser of MurmurHash3); kernels.py has the same in torch, bit for bit. */
void stochastic_round(const float *x, uint16_t *y, int64_t count, int64_t seed) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        uint32_t h = (uint32_t)i * 0x9E3779B1u + (uint32_t)seed;
        h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u; h ^= h >> 16;
        uint32_t bits = float_to_bits(x[i]);
        uint32_t finite = (bits & 0x7F800000u) != 0x7F800000u;
        y[i] = (uint16_t)((bits + (finite ? h & 0xFFFFu : 0u)) >> 16);
    }
}

#include "kernels_encoder.c"
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define F(name) JOIN(name, SUFFIX)
#define GET JOIN(get, SUFFIX)
#define PUT JOIN(put, SUFFIX)

#define T float
#define SUFFIX f32
#include "kernels.c"
#undef T
#undef SUFFIX
#define T uint16_t
#define SUFFIX bf16
#include "kernels.c"
#else

/* Cross-entropy of one row of logits against its label; the row becomes the gradient softmax(logits) - onehot(label). */
void F(cross_entropy)(T *logits, const int64_t *labels, float *losses, int64_t rows, int64_t vocabulary) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        T *row = logits + i * vocabulary;
        float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < vocabulary; j++) { float x = GET(row[j]); top = x > top ? x : top; }
        float target = GET(row[labels[i]]);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < vocabulary; j++) sum += fast_exp(GET(row[j]) - top);
        losses[i] = top + logf(sum) - target;
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < vocabulary; j++) row[j] = PUT(fast_exp(GET(row[j]) - top) * inverse);
        row[labels[i]] = PUT(fast_exp(target - top) * inverse - 1.0f);
    }
}

/* scores (heads, rows, columns) -> causal softmax(scale * scores), in place. The rows are the last of `columns` positions: row r
 * sees columns 0 .. columns - rows + r, the others become 0. */
void F(causal_softmax)(T *scores, float scale, int64_t heads, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static, 16)
    for (int64_t i = 0; i < heads * rows; i++) {
        T *row = scores + i * columns;
        int64_t n = columns - rows + i % rows + 1;
        float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) { float x = GET(row[j]) * scale; top = x > top ? x : top; }
        float part[n]; /* not rounded yet; an exponential costs more than keeping it */
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += part[j] = fast_exp(GET(row[j]) * scale - top);
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) row[j] = PUT(part[j] * inverse);
        for (int64_t j = n; j < columns; j++) row[j] = 0;
    }
}

/* grad (heads, rows, columns), in place: scale * p * (grad - sum_j p grad), with p from causal_softmax. */
void F(causal_softmax_backward)(T *grad, const T *p, float scale, int64_t heads, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static, 16)
    for (int64_t i = 0; i < heads * rows; i++) {
        T *g = grad + i * columns;
        const T *q = p + i * columns;
        int64_t n = columns - rows + i % rows + 1;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < n; j++) dot += GET(q[j]) * GET(g[j]);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) g[j] = PUT(scale * GET(q[j]) * (GET(g[j]) - dot));
        for (int64_t j = n; j < columns; j++) g[j] = 0;
    }
}

/* y = x / rms(x) * weight; inverse (rows) keeps 1 / rms. x / rms is rounded to T before the product, as transformers does. */
void F(rms_norm)(const T *x, const T *weight, T *y, float *inverse, float epsilon, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = x + i * width;
        T *out = y + i * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) { float v = GET(in[j]); sum += v * v; }
        float r = 1.0f / sqrtf(sum / (float)width + epsilon);
        inverse[i] = r;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = PUT(GET(PUT(GET(in[j]) * r)) * GET(weight[j]));
    }
}

void F(rms_norm_backward)(const T *x, const T *weight, const T *grad, const float *inverse, T *dx, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *in = x + i * width, *g = grad + i * width;
        T *out = dx + i * width;
        float r = inverse[i], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; j++) dot += GET(g[j]) * GET(weight[j]) * GET(in[j]);
        float c = dot * r * r * r / (float)width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = PUT(GET(g[j]) * GET(weight[j]) * r - GET(in[j]) * c);
    }
}

/* SwiGLU: y = silu(gate) * up. gate and up are column blocks of wider rows: `stride` elements lie between rows of either. */
void F(swiglu)(const T *gate, const T *up, T *y, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *a = gate + i * stride, *b = up + i * stride;
        T *out = y + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float g = GET(a[j]);
            out[j] = PUT(GET(PUT(g / (1.0f + fast_exp(-g)))) * GET(b[j]));
        }
    }
}

void F(swiglu_backward)(const T *gate, const T *up, const T *grad, T *dgate, T *dup, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *a = gate + i * stride, *b = up + i * stride, *d = grad + i * width;
        T *da = dgate + i * stride, *db = dup + i * stride;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float g = GET(a[j]), u = GET(b[j]), dy = GET(d[j]);
            float s = 1.0f / (1.0f + fast_exp(-g));
            da[j] = PUT(dy * u * s * (1.0f + g * (1.0f - s)));
            db[j] = PUT(dy * g * s);
        }
    }
}

/* Rotary embedding (Su et al. 2021, the half-split form of transformers) with the change of layout that attention needs:
 * x rows (length, stride) holding heads of `dim` -> y (heads, length, dim). direction = 1 rotates, -1 rotates back (the backward
 * pass) and then reads y and writes x. cos and sin are (length, dim) in T. */
void F(rotary)(T *x, T *y, const T *cosine, const T *sine, int64_t heads, int64_t length, int64_t dim, int64_t stride, int64_t direction) {
    int64_t half = dim / 2;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < length; t++) {
        const T *c = cosine + t * dim, *s = sine + t * dim;
        for (int64_t h = 0; h < heads; h++) {
            T *wide = x + t * stride + h * dim, *tall = y + (h * length + t) * dim;
            if (direction > 0) {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float a = GET(wide[j]), b = GET(wide[j + half]);
                    tall[j] = PUT(a * GET(c[j]) - b * GET(s[j]));
                    tall[j + half] = PUT(b * GET(c[j + half]) + a * GET(s[j + half]));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float a = GET(tall[j]), b = GET(tall[j + half]);
                    wide[j] = PUT(a * GET(c[j]) + b * GET(s[j + half]));
                    wide[j + half] = PUT(b * GET(c[j + half]) - a * GET(s[j]));
                }
            }
        }
    }
}
#include "kernels_encoder.c"
#endif
