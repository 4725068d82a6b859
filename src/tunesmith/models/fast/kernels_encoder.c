/* The passes of encoders: bidirectional attention of short segments, layer norm, dropout by row. Part of
 * kernels.c. */
#ifndef T
#include <omp.h>

/* 32 random bits for element `at` under the key (low, high); noise.py has the same in torch, bit for bit. */
static inline uint32_t drawn(uint32_t at, uint32_t low, uint32_t high) {
    return mix_bits(mix_bits(at * 0x9E3779B1u + low) ^ high);
}
#else

/* y = (h - mean) / deviation * weight + bias, where h = x + more, rounded to T and kept in `sum`. With
 * sum == x there is no `more`, and h is x. */
void F(layer_norm)(
    const T *x, const T *more, const T *weight, const T *bias, T *sum, T *y, float *mean, float *inverse,
    float epsilon, i64 rows, i64 width) {
    PARALLEL EACH(i, rows) {
        const T *in = x + i * width, *other = more + i * width;
        T *h = sum + i * width, *out = y + i * width;
        float total = 0.0f, square = 0.0f;
        if (sum != x) {
            SIMD EACH(j, width) h[j] = PUT(GET(in[j]) + GET(other[j]));
        }
        SIMD_SUM(total) EACH(j, width) total += GET(h[j]);
        float middle = total / (float)width;
        SIMD_SUM(square) EACH(j, width) { float v = GET(h[j]) - middle; square += v * v; }
        float r = 1.0f / sqrtf(square / (float)width + epsilon);
        mean[i] = middle;
        inverse[i] = r;
        SIMD EACH(j, width) out[j] = PUT((GET(h[j]) - middle) * r * GET(weight[j]) + GET(bias[j]));
    }
}

void F(layer_norm_backward)(
    const T *h, const T *weight, const T *grad, const float *mean, const float *inverse, T *dh,
    i64 rows, i64 width) {
    PARALLEL EACH(i, rows) {
        const T *in = h + i * width, *g = grad + i * width;
        T *out = dh + i * width;
        float m = mean[i], r = inverse[i], plain = 0.0f, dot = 0.0f;
        PRAGMA(omp simd reduction(+ : plain, dot))
        EACH(j, width) {
            float v = GET(g[j]) * GET(weight[j]);
            plain += v;
            dot += v * (GET(in[j]) - m) * r;
        }
        plain /= (float)width;
        dot /= (float)width;
        SIMD EACH(j, width)
            out[j] = PUT(r * (GET(g[j]) * GET(weight[j]) - plain - (GET(in[j]) - m) * r * dot));
    }
}

/* Gradients of weight and bias: sums over rows, one thread for a block of columns. */
void F(layer_norm_weights)(
    const T *h, const T *grad, const float *mean, const float *inverse, float *dweight, float *dbias,
    i64 rows, i64 width) {
    PARALLEL for (i64 first = 0; first < width; first += 64) {
        i64 last = first + 64 < width ? first + 64 : width;
        RANGE(j, first, last) dweight[j] = dbias[j] = 0.0f;
        EACH(i, rows) {
            float m = mean[i], r = inverse[i];
            SIMD RANGE(j, first, last) {
                float g = GET(grad[i * width + j]);
                dweight[j] += g * (GET(h[i * width + j]) - m) * r;
                dbias[j] += g;
            }
        }
    }
}

/* Sums over the rows of x (rows, width): the gradient of a bias. */
void F(column_sums)(const T *x, float *sums, i64 rows, i64 width) {
    PARALLEL for (i64 first = 0; first < width; first += 64) {
        i64 last = first + 64 < width ? first + 64 : width;
        RANGE(j, first, last) sums[j] = 0.0f;
        EACH(i, rows) {
            SIMD RANGE(j, first, last) sums[j] += GET(x[i * width + j]);
        }
    }
}

/* Inverted dropout: element j of row i is kept, times `scale`, where the upper 24 bits of its draw are
 * `least` or more. The draw is that of element place[i] * width + j under the key
 * (keys[2 i], keys[2 i + 1]). Rows with place < 0 are copied. */
void F(row_dropout)(
    const T *x, T *y, const i64 *keys, const i64 *place, float scale, i64 least, i64 rows, i64 width) {
    PARALLEL EACH(i, rows) {
        const T *in = x + i * width;
        T *out = y + i * width;
        uint32_t low = (uint32_t)keys[2 * i], high = (uint32_t)keys[2 * i + 1];
        uint32_t first = (uint32_t)(place[i] * width), limit = place[i] < 0 ? 0u : (uint32_t)least;
        float factor = place[i] < 0 ? 1.0f : scale;
        SIMD EACH(j, width) {
            uint32_t h = drawn(first + (uint32_t)j, low, high) >> 8;
            out[j] = PUT(h >= limit ? GET(in[j]) * factor : 0.0f);
        }
    }
}

/* Attention of every token of a segment to every other, in float; no weights are kept. `qkv` holds rows
 * of `stride` elements: heads of queries, then kv_heads of keys, then of values, `dim` numbers each.
 * `edges` (segments + 1) are the starts of the segments. One thread computes a segment and a key head
 * with all query heads that share it. `scratch` has `room` floats for each of `threads`. */
#define BLOCK 64 /* queries at a time */
#define PARALLEL_SEGMENTS PRAGMA(omp parallel for schedule(dynamic) num_threads(threads))
static inline void F(read_heads)(const T *x, i64 stride, float *y, i64 rows, i64 padded, i64 dim, i64 wide) {
    EACH(i, padded) {
        SIMD EACH(j, wide) y[i * wide + j] = i < rows && j < dim ? GET(x[i * stride + j]) : 0.0f;
    }
}
static inline void F(transpose)(const float *x, float *y, i64 rows, i64 columns, i64 wide) {
    EACH(j, columns)
        EACH(i, rows) y[j * rows + i] = x[i * wide + j];
}
static inline void F(softmax)(float *scores, float scale, i64 rows, i64 n, i64 padded) {
    EACH(i, rows) {
        float *row = scores + i * padded, top = -INFINITY, sum = 0.0f;
        SIMD_MAX(top) EACH(j, n) { row[j] *= scale; top = row[j] > top ? row[j] : top; }
        SIMD_SUM(sum) EACH(j, n) { row[j] = fast_exp(row[j] - top); sum += row[j]; }
        float inverse = 1.0f / sum;
        SIMD EACH(j, n) row[j] *= inverse;
        RANGE(j, n, padded) row[j] = 0.0f;
    }
}

void F(bidirectional_attention)(
    const T *qkv, T *out, const i64 *edges, float *scratch, float scale, i64 segments, i64 heads,
    i64 kv_heads, i64 dim, i64 room, i64 threads) {
    i64 stride = (heads + 2 * kv_heads) * dim, group = heads / kv_heads, wide = round_up_16(dim);
    PARALLEL_SEGMENTS EACH(item, segments * kv_heads) {
        i64 start = edges[item / kv_heads], n = edges[item / kv_heads + 1] - start, padded = round_up_16(n);
        i64 block = padded * wide;
        const T *q = qkv + start * stride, *k = q + (heads + item % kv_heads) * dim, *v = k + kv_heads * dim;
        float *own = scratch + omp_get_thread_num() * room, *keys = own + block, *values = keys + block;
        float *scores = values + block, *mixed = scores + BLOCK * padded;
        F(read_heads)(k, stride, own, n, padded, dim, wide);
        F(transpose)(own, keys, padded, dim, wide);
        F(read_heads)(v, stride, values, n, padded, dim, wide);
        EACH(g, group) {
            i64 head = item % kv_heads * group + g;
            F(read_heads)(q + head * dim, stride, own, n, padded, dim, wide);
            for (i64 first = 0; first < n; first += BLOCK) {
                i64 rows = n - first < BLOCK ? n - first : BLOCK;
                product(own + first * wide, wide, keys, scores, rows, dim, padded);
                F(softmax)(scores, scale, rows, n, padded);
                product(scores, padded, values, mixed, rows, n, wide);
                EACH(i, rows) {
                    T *to = out + ((start + first + i) * heads + head) * dim;
                    SIMD EACH(j, dim) to[j] = PUT(mixed[i * wide + j]);
                }
            }
        }
    }
}

/* Its gradients, laid out like qkv. With P = softmax(scale q k^T), computed again: dV = P^T dO, dP = dO V^T,
 * dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q. */
void F(bidirectional_attention_backward)(
    const T *qkv, const T *grad, T *dqkv, const i64 *edges, float *scratch, float scale, i64 segments,
    i64 heads, i64 kv_heads, i64 dim, i64 room, i64 threads) {
    i64 stride = (heads + 2 * kv_heads) * dim, group = heads / kv_heads, wide = round_up_16(dim);
    PARALLEL_SEGMENTS EACH(item, segments * kv_heads) {
        i64 start = edges[item / kv_heads], n = edges[item / kv_heads + 1] - start, padded = round_up_16(n);
        i64 block = padded * wide, key = (heads + item % kv_heads) * dim, value = key + kv_heads * dim;
        const T *from = qkv + start * stride;
        T *to = dqkv + start * stride;
        float *q = scratch + omp_get_thread_num() * room, *k = q + block, *up = k + block, *keys = up + block;
        float *values = keys + block, *dk = values + block, *dv = dk + block, *p = dv + block;
        float *ds = p + BLOCK * padded, *dq = ds + BLOCK * padded;
        F(read_heads)(from + value, stride, k, n, padded, dim, wide);
        F(transpose)(k, values, padded, dim, wide);
        F(read_heads)(from + key, stride, k, n, padded, dim, wide);
        F(transpose)(k, keys, padded, dim, wide);
        memset(dk, 0, 2 * block * sizeof(float));
        EACH(g, group) {
            i64 head = item % kv_heads * group + g;
            F(read_heads)(from + head * dim, stride, q, n, padded, dim, wide);
            F(read_heads)(grad + (start * heads + head) * dim, heads * dim, up, n, padded, dim, wide);
            for (i64 first = 0; first < n; first += BLOCK) {
                i64 rows = n - first < BLOCK ? n - first : BLOCK;
                const float *queries = q + first * wide, *above = up + first * wide;
                product(queries, wide, keys, p, rows, dim, padded);
                F(softmax)(p, scale, rows, n, padded);
                add_product_across(p, padded, above, dv, padded, rows, wide);
                product(above, wide, values, ds, rows, dim, padded);
                EACH(i, rows) {
                    float *d = ds + i * padded, dot = 0.0f;
                    const float *w = p + i * padded;
                    SIMD_SUM(dot) EACH(j, padded) dot += w[j] * d[j];
                    SIMD EACH(j, padded) d[j] = scale * w[j] * (d[j] - dot);
                }
                product(ds, padded, k, dq, rows, n, wide);
                add_product_across(ds, padded, queries, dk, padded, rows, wide);
                EACH(i, rows) {
                    T *row = to + (first + i) * stride + head * dim;
                    SIMD EACH(j, dim) row[j] = PUT(dq[i * wide + j]);
                }
            }
        }
        EACH(i, n) {
            T *row = to + i * stride;
            SIMD EACH(j, dim) {
                row[key + j] = PUT(dk[i * wide + j]);
                row[value + j] = PUT(dv[i * wide + j]);
            }
        }
    }
}
#undef BLOCK
#undef PARALLEL_SEGMENTS
#endif
