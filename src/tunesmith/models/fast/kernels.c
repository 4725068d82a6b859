/* The element-wise passes of a transformer's training step, fused, for CPUs.
 *
 * torch (oneDNN, AMX) computes the matrix products. Between them eager torch makes five to ten passes over
 * each activation, in fp32, on one core each. These functions make one pass, vectorised by the compiler,
 * with the rows shared out over OpenMP threads. One thread reduces a row in a fixed order, so results do not
 * depend on the number of threads.
 *
 * This file and those that it includes are compiled twice into one library: T = float and T = bf16 (stored as
 * uint16_t, computed in float). kernels.py binds them and tests some at start; tests/models/test_kernels.py
 * compares every pass, forward and backward, with its formula in torch.
 */
#ifndef T
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL PRAGMA(omp parallel for schedule(static))
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(x) PRAGMA(omp simd reduction(+ : x))
#define SIMD_MAX(x) PRAGMA(omp simd reduction(max : x))
#define RANGE(j, first, last) for (i64 j = (first); j < (last); j++)
#define EACH(j, n) RANGE(j, 0, n)

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float get_f32(float x) { return x; }
static inline float put_f32(float x) { return x; }
static inline float get_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }
/* Round to nearest even. NaN stays NaN because exponent and mantissa top bits stay set. */
static inline uint16_t put_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
/* exp to about 1e-7 relative error: 2^n * p(r), |r| <= ln2/2. NaN for NaN; 0 below -87, where exp is
 * 1e-38 or less. */
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
/* The finaliser of the hash MurmurHash3; kernels.py has the same in torch, bit for bit. */
static inline uint32_t mix_bits(uint32_t h) {
    h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

/* fp32 -> bf16, up or down at random in proportion to the bits that are lost, so that the mean is x. The
 * random bits are a hash of index and seed; kernels.py has the same in torch, bit for bit. */
void stochastic_round(const float *x, uint16_t *y, i64 count, i64 seed) {
    PRAGMA(omp parallel for simd schedule(static))
    EACH(i, count) {
        uint32_t h = mix_bits((uint32_t)i * 0x9E3779B1u + (uint32_t)seed);
        uint32_t bits = float_to_bits(x[i]);
        uint32_t finite = (bits & 0x7F800000u) != 0x7F800000u;
        y[i] = (uint16_t)((bits + (finite ? h & 0xFFFFu : 0u)) >> 16);
    }
}

#include <stdlib.h>
#include "kernels_sampling.c"
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define F(name) JOIN(name, SUFFIX)
#define GET JOIN(get, SUFFIX)
#define PUT JOIN(put, SUFFIX)

/* W: the type of weights in a decoding step, where it may be narrower than T. FT: the functions for T. */
#define W T
#define FT F
#include "kernels_products.c"
#include "kernels_attention.c"
#include "kernels_encoder.c"
#include "kernels_decode.c"
#include "kernels_prefill.c"
#define T float
#define SUFFIX f32
#include "kernels.c"
#undef T
#undef SUFFIX
#define T uint16_t
#define SUFFIX bf16
#include "kernels.c"
#undef T
#undef SUFFIX
#undef W
#undef FT
#undef GET
#undef PUT
/* The forms of the decoding step whose weights are not of type T. */
#define HAS_PANELS_mixed 1
#define HAS_PANELS_int8_f32 1
#define HAS_PANELS_int8_bf16 1
#define IS_INT8_int8_f32 1
#define IS_INT8_int8_bf16 1
#define T float
#define GET get_f32
#define PUT put_f32
#define FT(name) JOIN(name, f32)
#define W uint16_t
#define SUFFIX mixed
#include "kernels_products.c"
#include "kernels_decode.c"
#undef W
#undef SUFFIX
#define W int8_t
#define SUFFIX int8_f32
#include "kernels_products.c"
#include "kernels_decode.c"
#undef T
#undef SUFFIX
#undef GET
#undef PUT
#undef FT
#define T uint16_t
#define GET get_bf16
#define PUT put_bf16
#define FT(name) JOIN(name, bf16)
#define SUFFIX int8_bf16
#include "kernels_products.c"
#include "kernels_decode.c"
#else

/* Cross-entropy of each row of logits against its label. The row becomes the gradient softmax(logits) -
 * onehot(label). */
void F(cross_entropy)(T *logits, const i64 *labels, float *losses, i64 rows, i64 vocabulary) {
    PARALLEL EACH(i, rows) {
        T *row = logits + i * vocabulary;
        float top = -INFINITY, sum = 0.0f;
        SIMD_MAX(top) EACH(j, vocabulary) { float x = GET(row[j]); top = x > top ? x : top; }
        float target = GET(row[labels[i]]);
        SIMD_SUM(sum) EACH(j, vocabulary) sum += fast_exp(GET(row[j]) - top);
        losses[i] = top + logf(sum) - target;
        float inverse = 1.0f / sum;
        SIMD EACH(j, vocabulary) row[j] = PUT(fast_exp(GET(row[j]) - top) * inverse);
        row[labels[i]] = PUT(fast_exp(target - top) * inverse - 1.0f);
    }
}

/* The loss of cross_entropy, to the last bit, and the entropy of softmax(logits), without gradients: the logits
 * are read twice and never written. */
void F(losses_and_entropies)(
    const T *logits, const i64 *labels, float *losses, float *entropies, i64 rows, i64 vocabulary) {
    PARALLEL EACH(i, rows) {
        const T *row = logits + i * vocabulary;
        float top = -INFINITY, sum = 0.0f, dot = 0.0f;
        SIMD_MAX(top) EACH(j, vocabulary) { float x = GET(row[j]); top = x > top ? x : top; }
        PRAGMA(omp simd reduction(+ : sum, dot)) EACH(j, vocabulary) {
            float below = GET(row[j]) - top, e = fast_exp(below);
            sum += e;
            dot += e * (below < -87.0f ? 0.0f : below); /* 0 log 0 = 0 */
        }
        losses[i] = top + logf(sum) - GET(row[labels[i]]);
        entropies[i] = logf(sum) - dot / sum;
    }
}

/* scores (heads, rows, columns) -> causal softmax(scale * scores), in place. The rows are the last of
 * `columns` positions: row r attends to columns 0 .. columns - rows + r, the others become 0. */
void F(causal_softmax)(T *scores, float scale, i64 heads, i64 rows, i64 columns) {
    PRAGMA(omp parallel for schedule(static, 16))
    EACH(i, heads * rows) {
        T *row = scores + i * columns;
        i64 n = columns - rows + i % rows + 1;
        float top = -INFINITY, sum = 0.0f;
        SIMD_MAX(top) EACH(j, n) { float x = GET(row[j]) * scale; top = x > top ? x : top; }
        float part[n]; /* not rounded yet; an exponential costs more than keeping it */
        SIMD_SUM(sum) EACH(j, n) sum += part[j] = fast_exp(GET(row[j]) * scale - top);
        float inverse = 1.0f / sum;
        SIMD EACH(j, n) row[j] = PUT(part[j] * inverse);
        RANGE(j, n, columns) row[j] = 0;
    }
}

/* grad (heads, rows, columns), in place: scale * p * (grad - sum_j p grad), with p from causal_softmax. */
void F(causal_softmax_backward)(T *grad, const T *p, float scale, i64 heads, i64 rows, i64 columns) {
    PRAGMA(omp parallel for schedule(static, 16))
    EACH(i, heads * rows) {
        T *g = grad + i * columns;
        const T *q = p + i * columns;
        i64 n = columns - rows + i % rows + 1;
        float dot = 0.0f;
        SIMD_SUM(dot) EACH(j, n) dot += GET(q[j]) * GET(g[j]);
        SIMD EACH(j, n) g[j] = PUT(scale * GET(q[j]) * (GET(g[j]) - dot));
        RANGE(j, n, columns) g[j] = 0;
    }
}

/* y = x / rms(x) * weight; inverse (rows) is 1 / rms. As in transformers, x / rms is rounded to T before
 * the product. */
void F(rms_norm)(const T *x, const T *weight, T *y, float *inverse, float epsilon, i64 rows, i64 width) {
    PARALLEL EACH(i, rows) {
        const T *in = x + i * width;
        T *out = y + i * width;
        float sum = 0.0f;
        SIMD_SUM(sum) EACH(j, width) { float v = GET(in[j]); sum += v * v; }
        float r = 1.0f / sqrtf(sum / (float)width + epsilon);
        inverse[i] = r;
        SIMD EACH(j, width) out[j] = PUT(GET(PUT(GET(in[j]) * r)) * GET(weight[j]));
    }
}

void F(rms_norm_backward)(
    const T *x, const T *weight, const T *grad, const float *inverse, T *dx, i64 rows, i64 width) {
    PARALLEL EACH(i, rows) {
        const T *in = x + i * width, *g = grad + i * width;
        T *out = dx + i * width;
        float r = inverse[i], dot = 0.0f;
        SIMD_SUM(dot) EACH(j, width) dot += GET(g[j]) * GET(weight[j]) * GET(in[j]);
        float c = dot * r * r * r / (float)width;
        SIMD EACH(j, width) out[j] = PUT(GET(g[j]) * GET(weight[j]) * r - GET(in[j]) * c);
    }
}

/* SwiGLU: y = silu(gate) * up. gate and up are column blocks of wider rows, which are `stride` elements
 * apart. */
void F(swiglu)(const T *gate, const T *up, T *y, i64 rows, i64 width, i64 stride) {
    PARALLEL EACH(i, rows) {
        const T *a = gate + i * stride, *b = up + i * stride;
        T *out = y + i * width;
        SIMD EACH(j, width) {
            float g = GET(a[j]);
            out[j] = PUT(GET(PUT(g / (1.0f + fast_exp(-g)))) * GET(b[j]));
        }
    }
}

void F(swiglu_backward)(
    const T *gate, const T *up, const T *grad, T *dgate, T *dup, i64 rows, i64 width, i64 stride) {
    PARALLEL EACH(i, rows) {
        const T *a = gate + i * stride, *b = up + i * stride, *d = grad + i * width;
        T *da = dgate + i * stride, *db = dup + i * stride;
        SIMD EACH(j, width) {
            float g = GET(a[j]), u = GET(b[j]), dy = GET(d[j]);
            float s = 1.0f / (1.0f + fast_exp(-g));
            da[j] = PUT(dy * u * s * (1.0f + g * (1.0f - s)));
            db[j] = PUT(dy * g * s);
        }
    }
}

/* Rotary embedding (Su et al. 2021, the half-split form of transformers) with the change of layout that
 * attention needs: x rows (length, stride) of heads of `dim` -> y (heads, length, dim). direction = 1
 * rotates. direction = -1, the backward pass, rotates back: it reads y and writes x. cos and sin are
 * (length, dim) in T. */
void F(rotary)(
    T *x, T *y, const T *cosine, const T *sine, i64 heads, i64 length, i64 dim, i64 stride, i64 direction) {
    i64 half = dim / 2;
    PARALLEL EACH(t, length) {
        const T *c = cosine + t * dim, *s = sine + t * dim;
        EACH(h, heads) {
            T *wide = x + t * stride + h * dim, *tall = y + (h * length + t) * dim;
            if (direction > 0) {
                SIMD EACH(j, half) {
                    float a = GET(wide[j]), b = GET(wide[j + half]);
                    tall[j] = PUT(a * GET(c[j]) - b * GET(s[j]));
                    tall[j + half] = PUT(b * GET(c[j + half]) + a * GET(s[j + half]));
                }
            } else {
                SIMD EACH(j, half) {
                    float a = GET(tall[j]), b = GET(tall[j + half]);
                    wide[j] = PUT(a * GET(c[j]) + b * GET(s[j + half]));
                    wide[j + half] = PUT(b * GET(c[j + half]) - a * GET(s[j]));
                }
            }
        }
    }
}
#include "kernels_encoder.c"

#include "kernels_products.c"
#include "kernels_decode.c"
#include "kernels_prefill.c"
#endif
