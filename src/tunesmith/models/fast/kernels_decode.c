/* One decoding step: one new token of each running row. Included by kernels.c, once for each type of weights.
 *
 * Activations and sums are fp32 whatever the weights are stored in. At few rows the time of a step is that of
 * reading the weights once, so every weight is read once for all rows, and nothing else leaves the cache.
 */
#ifndef DECODE_ONCE
#define DECODE_ONCE
#include <stdlib.h>
#define AHEAD_BYTES 8192 /* weights are prefetched this many bytes before they are used */
/* Sizes of the network and of its cache, in the order in which decode_step.py passes them. */
typedef struct { i64 rows, layers, hidden, heads, kv_heads, dim, inner, vocabulary, capacity, window; } Sizes;
/* Pointers of one layer, in the order in which decode_step.py passes them; 0 for one that is absent. */
typedef struct {
    const void *norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *o, *o_bias, *mlp_norm, *gate, *up, *down;
    void *keys, *values;
} Layer;
#endif

/* q (group, dim), already scaled, against `seen` keys of one head -> out (group, value_dim), fp32. */
static void F(attend_head)(const float *q, const T *k, const T *v, float *out, i64 group, i64 seen, i64 dim,
                           i64 value_dim, float softcap) {
    float *part = malloc(sizeof(float) * (size_t)(group * seen));
    EACH(j, seen) EACH(g, group) {
        float dot = 0.0f;
        SIMD_SUM(dot) EACH(d, dim) dot += q[g * dim + d] * GET(k[j * dim + d]);
        part[g * seen + j] = softcap > 0.0f ? softcap * tanhf(dot / softcap) : dot;
    }
    EACH(g, group) {
        float top = -INFINITY, sum = 0.0f, *p = part + g * seen;
        SIMD_MAX(top) EACH(j, seen) top = p[j] > top ? p[j] : top;
        SIMD_SUM(sum) EACH(j, seen) sum += p[j] = fast_exp(p[j] - top);
        float inverse = 1.0f / sum;
        SIMD EACH(j, seen) p[j] *= inverse;
    }
    EACH(i, group * value_dim) out[i] = 0.0f;
    EACH(j, seen) EACH(g, group) {
        float p = part[g * seen + j];
        SIMD EACH(d, value_dim) out[g * value_dim + d] += p * GET(v[j * value_dim + d]);
    }
    free(part);
}

/* Attention of one new token a row to the first `lengths` tokens of its slot. q (rows, heads, dim), keys and
 * values (slots, kv_heads, capacity, dim or value_dim), out (rows, heads, value_dim). window > 0: the last
 * `window` tokens only. softcap > 0: scores become softcap * tanh(score / softcap). Query heads that share a key
 * head are computed together, so that each key and value is read once. */
void F(decode_attention)(const T *q, const T *keys, const T *values, const i64 *slots, const i64 *lengths, T *out,
                         float scale, float softcap, i64 window, i64 rows, i64 heads, i64 kv_heads, i64 capacity,
                         i64 dim, i64 value_dim) {
    i64 group = heads / kv_heads;
    PRAGMA(omp parallel for schedule(dynamic))
    EACH(task, rows * kv_heads) {
        i64 row = task / kv_heads, head = task % kv_heads, n = lengths[row];
        i64 first = window > 0 && n > window ? n - window : 0, at = (slots[row] * kv_heads + head) * capacity + first;
        float query[group * dim], sums[group * value_dim];
        EACH(i, group * dim) query[i] = GET(q[(row * heads + head * group) * dim + i]) * scale;
        F(attend_head)(query, keys + at * dim, values + at * value_dim, sums, group, n - first, dim, value_dim, softcap);
        EACH(i, group * value_dim) out[(row * heads + head * group) * value_dim + i] = PUT(sums[i]);
    }
}

/* y (rows, out) with stride, = or += x (rows, in) w^T + bias, w (out, in). Four rows at a time share a pass over
 * two rows of w; w is read from memory once, because its rows stay in the first cache for all x. */
static void F(rows_linear)(const float *x, const void *weight, const void *bias, float *y, i64 rows, i64 in, i64 out,
                           i64 stride, i64 add) {
    const T *w = weight, *b = bias;
    PRAGMA(omp parallel for schedule(static))
    EACH(pair, out / 2) {
        const T *w0 = w + 2 * pair * in, *w1 = w0 + in;
        float first = b ? GET(b[2 * pair]) : 0.0f, second = b ? GET(b[2 * pair + 1]) : 0.0f;
        const char *ahead = (const char *)w0 + AHEAD_BYTES;
        for (i64 i = 0; i < 2 * in * (i64)sizeof(T); i += 64) __builtin_prefetch(ahead + i);
        i64 r = 0;
        for (; r + 4 <= rows; r += 4) {
            const float *x0 = x + r * in, *x1 = x0 + in, *x2 = x1 + in, *x3 = x2 + in;
            float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
            PRAGMA(omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3))
            EACH(i, in) {
                float u = GET(w0[i]), v = GET(w1[i]);
                a0 += x0[i] * u; a1 += x1[i] * u; a2 += x2[i] * u; a3 += x3[i] * u;
                b0 += x0[i] * v; b1 += x1[i] * v; b2 += x2[i] * v; b3 += x3[i] * v;
            }
            float sums[8] = {a0, a1, a2, a3, b0, b1, b2, b3};
            EACH(j, 4) {
                float *here = y + (r + j) * stride + 2 * pair;
                here[0] = sums[j] + first + (add ? here[0] : 0.0f);
                here[1] = sums[4 + j] + second + (add ? here[1] : 0.0f);
            }
        }
        for (; r < rows; r++) {
            const float *x0 = x + r * in;
            float a0 = 0, b0 = 0, *here = y + r * stride + 2 * pair;
            PRAGMA(omp simd reduction(+ : a0, b0))
            EACH(i, in) { a0 += x0[i] * GET(w0[i]); b0 += x0[i] * GET(w1[i]); }
            here[0] = a0 + first + (add ? here[0] : 0.0f);
            here[1] = b0 + second + (add ? here[1] : 0.0f);
        }
    }
}

/* y = x / rms(x) * weight for each of `rows` rows of `width`. */
static void F(rows_norm)(const float *x, const void *weight, float *y, i64 rows, i64 width, float epsilon) {
    const T *w = weight;
    EACH(r, rows) {
        const float *from = x + r * width;
        float sum = 0.0f;
        SIMD_SUM(sum) EACH(i, width) sum += from[i] * from[i];
        float inverse = 1.0f / sqrtf(sum / (float)width + epsilon);
        SIMD EACH(i, width) y[r * width + i] = from[i] * inverse * GET(w[i]);
    }
}

/* Rotate the halves of a head (Su et al. 2021, as in llama): x cos + rotate_half(x) sin. */
static inline void F(rotate)(float *x, const float *cosine, const float *sine, i64 dim) {
    EACH(i, dim / 2) {
        float low = x[i], high = x[dim / 2 + i];
        x[i] = low * cosine[i] - high * sine[i];
        x[dim / 2 + i] = high * cosine[dim / 2 + i] + low * sine[dim / 2 + i];
    }
}

/* One layer in place on x (rows, hidden). `space`: (2 heads + 2 kv_heads) dim + hidden + 2 inner floats a row. */
static void F(decode_layer)(float *x, const Layer *layer, const Sizes *n, const float *cosine, const float *sine,
                            const i64 *slots, const i64 *places, float *space, float epsilon, float scale) {
    i64 rows = n->rows, hidden = n->hidden, heads = n->heads, kv_heads = n->kv_heads, dim = n->dim, inner = n->inner;
    i64 width = (heads + 2 * kv_heads) * dim, group = heads / kv_heads;
    float *normed = space, *qkv = normed + rows * hidden, *mixed = qkv + rows * width, *both = mixed + rows * heads * dim;
    T *keys = layer->keys, *values = layer->values;
    F(rows_norm)(x, layer->norm, normed, rows, hidden, epsilon);
    F(rows_linear)(normed, layer->q, layer->q_bias, qkv, rows, hidden, heads * dim, width, 0);
    F(rows_linear)(normed, layer->k, layer->k_bias, qkv + heads * dim, rows, hidden, kv_heads * dim, width, 0);
    F(rows_linear)(normed, layer->v, layer->v_bias, qkv + (heads + kv_heads) * dim, rows, hidden, kv_heads * dim, width, 0);
    PRAGMA(omp parallel for schedule(dynamic))
    EACH(task, rows * kv_heads) {
        i64 row = task / kv_heads, head = task % kv_heads, place = places[row], seen = place + 1;
        i64 first = n->window > 0 && seen > n->window ? seen - n->window : 0;
        i64 slot = (slots[row] * kv_heads + head) * n->capacity;
        float *q = qkv + row * width + head * group * dim, *k = qkv + row * width + (heads + head) * dim;
        const float *v = k + kv_heads * dim, *c = cosine + row * dim, *s = sine + row * dim;
        if (layer->q_norm) F(rows_norm)(q, layer->q_norm, q, group, dim, epsilon);
        if (layer->k_norm) F(rows_norm)(k, layer->k_norm, k, 1, dim, epsilon);
        EACH(g, group) F(rotate)(q + g * dim, c, s, dim);
        F(rotate)(k, c, s, dim);
        EACH(i, group * dim) q[i] *= scale;
        EACH(i, dim) { keys[(slot + place) * dim + i] = PUT(k[i]); values[(slot + place) * dim + i] = PUT(v[i]); }
        F(attend_head)(q, keys + (slot + first) * dim, values + (slot + first) * dim, mixed + (row * heads + head * group) * dim,
                       group, seen - first, dim, dim, 0.0f);
    }
    F(rows_linear)(mixed, layer->o, layer->o_bias, x, rows, heads * dim, hidden, hidden, 1);
    F(rows_norm)(x, layer->mlp_norm, normed, rows, hidden, epsilon);
    F(rows_linear)(normed, layer->gate, 0, both, rows, hidden, inner, 2 * inner, 0);
    F(rows_linear)(normed, layer->up, 0, both + inner, rows, hidden, inner, 2 * inner, 0);
    float *product = both + 2 * rows * inner;
    PRAGMA(omp parallel for schedule(static))
    EACH(r, rows) {
        const float *gate = both + 2 * r * inner, *up = gate + inner;
        SIMD EACH(i, inner) product[r * inner + i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
    }
    F(rows_linear)(product, layer->down, 0, x, rows, inner, hidden, hidden, 1);
}

/* The step of a llama: x (rows, hidden) holds the embeddings; logits (rows, vocabulary). Returns 1 if memory is short. */
i64 F(decode_step)(float *x, const Layer *layers, const Sizes *sizes, const T *norm, const T *head, const float *cosine,
                   const float *sine, const i64 *slots, const i64 *places, float *logits, float epsilon, float scale) {
    i64 width = 2 * sizes->hidden + (2 * sizes->heads + 2 * sizes->kv_heads) * sizes->dim + 3 * sizes->inner;
    float *space = malloc(sizeof(float) * (size_t)(sizes->rows * width));
    if (!space) return 1;
    EACH(l, sizes->layers) F(decode_layer)(x, layers + l, sizes, cosine, sine, slots, places, space, epsilon, scale);
    F(rows_norm)(x, norm, space, sizes->rows, sizes->hidden, epsilon);
    F(rows_linear)(space, head, 0, logits, sizes->rows, sizes->hidden, sizes->vocabulary, sizes->vocabulary, 0);
    free(space);
    return 0;
}
