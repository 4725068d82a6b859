/* Causal attention of packed segments in float, forward and backward, and the small products that it and the attention of
 * encoders consist of. Part of kernels.c.
 *
 * One thread computes the queries of one head that see the same keys. It skips what the mask hides, to TALL queries and 16
 * keys. Batched products of torch compute whole blocks of 64 queries, and Python calls five of them for each block.
 */
#ifndef T
#define PARTS (16 / LANES)

/* C (rows, 16) = A B, or C += A B: A (rows, n) at a[i * ai + j * aj], B (n, 16) with `bj` floats from one row to the next. */
INLINE void tile(
    const float *a, i64 ai, i64 aj, const float *b, i64 bj, float *c, i64 cw, i64 n, int rows, int add) {
    V sums[TALL][PARTS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int s = 0; s < PARTS; s++) {
            sums[r][s] = (V){0};
            if (add) memcpy(&sums[r][s], c + r * cw + s * LANES, sizeof(V));
        }
    const float *at[(TALL + 2) / 3]; /* one pointer for three rows: the compiler spills the offsets of all */
    UNROLL for (int r = 0; r < (rows + 2) / 3; r++) { at[r] = a + 3 * r * ai; HIDE(at[r]); }
    EACH(j, n) {
        V row[PARTS];
        UNROLL for (int s = 0; s < PARTS; s++) memcpy(&row[s], b + j * bj + s * LANES, sizeof(V));
        UNROLL for (int r = 0; r < rows; r++) {
            float x = at[r / 3][r % 3 * ai + j * aj];
            UNROLL for (int s = 0; s < PARTS; s++) sums[r][s] += x * row[s];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int s = 0; s < PARTS; s++) memcpy(c + r * cw + s * LANES, &sums[r][s], sizeof(V));
}
#if LANES == 16
#define EACH_HEIGHT(C) C(1) C(2) C(3) C(4) C(5) C(6) C(7) C(8) C(9) C(10) C(11)
#else
#define EACH_HEIGHT(C) C(1) C(2) C(3) C(4) C(5)
#endif
/* A tile with the rows of A one after another, and one with its columns. */
static void along(const float *a, i64 ai, const float *b, i64 bj, float *c, i64 cw, i64 n, i64 rows, int add) {
#define HEIGHT(r) case r: add ? tile(a, ai, 1, b, bj, c, cw, n, r, 1) : tile(a, ai, 1, b, bj, c, cw, n, r, 0); break;
    switch (rows) {
        EACH_HEIGHT(HEIGHT)
        default: add ? tile(a, ai, 1, b, bj, c, cw, n, TALL, 1) : tile(a, ai, 1, b, bj, c, cw, n, TALL, 0);
    }
#undef HEIGHT
}
static void across(const float *a, i64 aj, const float *b, i64 bj, float *c, i64 cw, i64 n, i64 rows) {
#define HEIGHT(r) case r: tile(a, 1, aj, b, bj, c, cw, n, r, 1); break;
    switch (rows) {
        EACH_HEIGHT(HEIGHT)
        default: tile(a, 1, aj, b, bj, c, cw, n, TALL, 1);
    }
#undef HEIGHT
}
#define EACH_TILE(i, m) for (i64 i = 0, tall = 0; tall = (m) - i < TALL ? (m) - i : TALL, i < (m); i += tall)

static inline i64 round_up_16(i64 n) { return (n + 15) / 16 * 16; }
static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* C = A B, with A and C of rows of `n` and `w` floats, B likewise of `w`, a multiple of 16. */
static void product(const float *a, i64 ai, const float *b, float *c, i64 m, i64 n, i64 w) {
    EACH_TILE(i, m) for (i64 l = 0; l < w; l += 16) along(a + i * ai, ai, b + l, w, c + i * w + l, w, n, tall, 0);
}
/* C += A^T B, with A (n, m) of rows of `aj` floats. */
static void add_product_across(const float *a, i64 aj, const float *b, float *c, i64 m, i64 n, i64 w) {
    EACH_TILE(i, m) for (i64 l = 0; l < w; l += 16) across(a + i, aj, b + l, w, c + i * w + l, w, n, tall);
}

/* `length` queries from token `start`: each sees `ahead` keys from token `prefix`, then causally its own segment. */
typedef struct { i64 start, length, ahead, prefix; } Run;
#define QUERIES_AT_ONCE 48 /* a multiple of every TALL */
#define QUERIES_PER_TASK 192 /* of each head that reads the keys of a task, which it packs once */

/* Rows of scores: an odd multiple of 16 floats, because the columns of rows of 2 KB share few places in the cache. */
static inline i64 score_wide(i64 keys) { return (round_up_16(keys) / 16 | 1) * 16; }

/* The keys of a run, transposed: 16 of them side by side, `dim` times, zeros for the last ones that are missing. */
static void pack_keys(const float *x, const Run *run, i64 dim, float *packed) {
    i64 keys = run->ahead + run->length;
    memset(packed + keys / 16 * 16 * dim, 0, sizeof(float) * (size_t)(16 * dim));
    for (i64 key = 0; key < keys;) {
        i64 other = key < run->ahead, end = least(other ? run->ahead : keys, key / 16 * 16 + 16);
        const float *from = x + (other ? run->prefix + key : run->start + key - run->ahead) * dim;
        swap_axes(from, dim, packed + key / 16 * 16 * dim + key % 16, 16, end - key, dim);
        key = end;
    }
}
/* scores = x keys^T of a block of rows, of which the first sees `seen` keys, each next one more. */
static void causal_products(const float *x, i64 x_wide, const float *packed, float *scores, i64 wide, i64 rows, i64 seen, i64 dim) {
    EACH_TILE(i, rows) for (i64 l = 0; l < seen + i + tall - 1; l += 16)
        along(x + i * x_wide, x_wide, packed + l * dim, 16, scores + i * wide + l, wide, dim, tall, 0);
}
/* y = weights x, of the rows of `causal_products`; x: all tokens of the keys' head. */
static void weighted_sums(
    const float *weights, i64 wide, const float *x, const Run *run, float *y, i64 y_wide, i64 rows, i64 seen, i64 dim) {
    const float *ahead = x + run->prefix * dim, *own = x + run->start * dim;
    EACH_TILE(i, rows) for (i64 d = 0; d < dim; d += 16) {
        float *to = y + i * y_wide + d;
        const float *row = weights + i * wide;
        if (run->ahead) along(row, wide, ahead + d, dim, to, y_wide, run->ahead, tall, 0);
        along(row + run->ahead, wide, own + d, dim, to, y_wide, seen + i + tall - 1 - run->ahead, tall, run->ahead > 0);
    }
}
/* y += weights^T x, for y with a row for each token. `first`: place of the block's first query in its run. */
static void add_weighted_sums(
    const float *weights, i64 wide, const float *x, i64 x_wide, const Run *run, float *y, i64 rows, i64 first, i64 dim) {
    EACH_TILE(i, run->ahead) for (i64 d = 0; d < dim; d += 16)
        across(weights + i, wide, x + d, x_wide, y + (run->prefix + i) * dim + d, dim, rows, tall);
    EACH_TILE(i, first + rows) {
        i64 from = i > first ? i - first : 0;
        const float *at = weights + from * wide + run->ahead + i;
        for (i64 d = 0; d < dim; d += 16)
            across(at, wide, x + from * x_wide + d, x_wide, y + (run->start + i) * dim + d, dim, rows - from, tall);
    }
}
/* A tile reads up to TALL columns that a row does not see: they are 0. */
static inline void hide(float *row, i64 seen, i64 wide) {
    RANGE(j, seen, least(seen + TALL, wide)) row[j] = 0.0f;
}

/* Attention of a block of rows as in `causal_products` -> y, and `norm` of each row: the largest product, and 1 / sum(exp(scale
 * (product - largest))). */
static void attend_rows(const float *q, i64 q_wide, const float *packed, const float *v, const Run *run, float *scores, i64 wide,
                        float scale, float *norm, float *y, i64 y_wide, i64 rows, i64 seen, i64 dim) {
    causal_products(q, q_wide, packed, scores, wide, rows, seen, dim);
    EACH(r, rows) {
        float *row = scores + r * wide, top = -INFINITY, sum = 0.0f;
        i64 n = seen + r;
        SIMD_MAX(top) EACH(j, n) top = row[j] > top ? row[j] : top;
        SIMD_SUM(sum) EACH(j, n) sum += row[j] = fast_exp((row[j] - top) * scale);
        norm[2 * r] = top;
        norm[2 * r + 1] = 1.0f / sum;
        hide(row, n, wide);
    }
    weighted_sums(scores, wide, v, run, y, y_wide, rows, seen, dim);
    EACH(r, rows) SIMD EACH(d, dim) y[r * y_wide + d] *= norm[2 * r + 1];
}

/* q (heads, tokens, dim), k and v (kv_heads, tokens, dim), runs (count) -> out (tokens, heads, dim), and `norms` (heads, tokens,
 * 2): the largest product of each query, and 1 / sum(exp(scale (product - largest))). dim is a multiple of 16. Returns 1 if
 * memory is short. */
i64 causal_attention(const float *q, const float *k, const float *v, float *out, float *norms, const Run *runs, float scale,
                     i64 count, i64 heads, i64 kv_heads, i64 tokens, i64 dim) {
    i64 failed = 0;
    PRAGMA(omp parallel for schedule(dynamic) reduction(| : failed))
    EACH(item, count * heads) {
        const Run *run = runs + item / heads;
        i64 head = item % heads, other = head / (heads / kv_heads) * tokens * dim, keys = run->ahead + run->length;
        i64 wide = score_wide(keys), even = round_up_16(keys + 1) * dim;
        float *packed = malloc(sizeof(float) * (size_t)(even + QUERIES_AT_ONCE * wide)), *scores = packed + even;
        if (!packed) { failed = 1; continue; }
        pack_keys(k + other, run, dim, packed);
        for (i64 first = 0; first < run->length; first += QUERIES_AT_ONCE) {
            i64 rows = least(run->length - first, QUERIES_AT_ONCE), token = run->start + first, seen = run->ahead + first + 1;
            float *norm = norms + 2 * (head * tokens + token), *to = out + (token * heads + head) * dim;
            attend_rows(q + (head * tokens + token) * dim, dim, packed, v + other, run, scores, wide, scale, norm, to, heads * dim, rows, seen, dim);
        }
        free(packed);
    }
    return failed;
}

/* Attention of the last `rows` of the `seen` tokens of a slot: q, keys and values as in `prefill_attention`, for one size of a
 * head, a multiple of 16 -> out (rows, heads, dim). Returns 1 if memory is short. */
i64 causal_attention_of_slot(const float *q, const float *keys, const float *values, float *out, float scale, i64 heads,
                             i64 kv_heads, i64 rows, i64 seen, i64 dim, i64 q_head, i64 q_row, i64 k_head, i64 v_head) {
    i64 group = heads / kv_heads, ahead = seen - rows, parts = (rows + QUERIES_PER_TASK - 1) / QUERIES_PER_TASK, failed = 0;
    PRAGMA(omp parallel for schedule(dynamic) reduction(| : failed))
    EACH(task, parts * kv_heads) {
        i64 begin = (parts - 1 - task / kv_heads) * QUERIES_PER_TASK, end = least(begin + QUERIES_PER_TASK, rows); /* the longest first */
        i64 other = task % kv_heads, head = other * group;
        Run run = {0, ahead + end, 0, 0};
        i64 wide = score_wide(run.length), even = round_up_16(run.length + 1) * dim;
        float norm[2 * QUERIES_AT_ONCE], *packed = malloc(sizeof(float) * (size_t)(even + QUERIES_AT_ONCE * wide));
        if (!packed) { failed = 1; continue; }
        pack_keys(keys + other * k_head, &run, dim, packed);
        EACH(g, group) for (i64 first = begin; first < end; first += QUERIES_AT_ONCE)
            attend_rows(q + (head + g) * q_head + first * q_row, q_row, packed, values + other * v_head, &run, packed + even, wide,
                        scale, norm, out + (first * heads + head + g) * dim, heads * dim, least(end - first, QUERIES_AT_ONCE),
                        ahead + first + 1, dim);
        free(packed);
    }
    return failed;
}

/* Its gradients by q, k and v, for `grad` (tokens, heads, dim). The runs between two of `edges` (families + 1) see keys of one
 * prefix. dks and dvs (heads, tokens, dim) get the sums of each query head, dk and dv those of all heads of a key head. With P =
 * softmax(scale q k^T), computed again: dV = P^T dO, dP = dO V^T, dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q. */
i64 causal_attention_backward(
    const float *q, const float *k, const float *v, const float *grad, const float *norms, float *dq, float *dk, float *dv,
    float *dks, float *dvs, const Run *runs, const i64 *edges, float scale, i64 families, i64 heads, i64 kv_heads, i64 tokens,
    i64 dim) {
    i64 failed = 0, group = heads / kv_heads;
    PRAGMA(omp parallel for schedule(dynamic) reduction(| : failed))
    EACH(item, families * heads) {
        i64 head = item % heads, own = head * tokens * dim, other = head / group * tokens * dim;
        const Run *begin = runs + edges[item / heads], *end = runs + edges[item / heads + 1];
        i64 from = begin->start * dim, all = end[-1].start + end[-1].length - begin->start;
        memset(dks + own + from, 0, sizeof(float) * (size_t)(all * dim));
        memset(dvs + own + from, 0, sizeof(float) * (size_t)(all * dim));
        for (const Run *run = begin; run < end; run++) {
            i64 keys = run->ahead + run->length, wide = score_wide(keys), even = round_up_16(keys + 1) * dim;
            float *packed = malloc(sizeof(float) * (size_t)(2 * even + 2 * QUERIES_AT_ONCE * wide));
            if (!packed) { failed = 1; break; }
            float *values = packed + even, *p = values + even, *ds = p + QUERIES_AT_ONCE * wide;
            pack_keys(k + other, run, dim, packed);
            pack_keys(v + other, run, dim, values);
            for (i64 first = 0; first < run->length; first += QUERIES_AT_ONCE) {
                i64 rows = least(run->length - first, QUERIES_AT_ONCE), token = run->start + first, seen = run->ahead + first + 1;
                const float *query = q + own + token * dim, *above = grad + (token * heads + head) * dim;
                causal_products(query, dim, packed, p, wide, rows, seen, dim);
                causal_products(above, heads * dim, values, ds, wide, rows, seen, dim);
                EACH(r, rows) {
                    float *weight = p + r * wide, *d = ds + r * wide, dot = 0.0f;
                    float top = norms[2 * (head * tokens + token + r)], inverse = norms[2 * (head * tokens + token + r) + 1];
                    i64 n = seen + r;
                    SIMD_SUM(dot) EACH(j, n) dot += d[j] * (weight[j] = fast_exp((weight[j] - top) * scale) * inverse);
                    SIMD EACH(j, n) d[j] = scale * weight[j] * (d[j] - dot);
                    hide(weight, n, wide);
                    hide(d, n, wide);
                }
                weighted_sums(ds, wide, k + other, run, dq + own + token * dim, dim, rows, seen, dim);
                add_weighted_sums(p, wide, above, heads * dim, run, dvs + own, rows, first, dim);
                add_weighted_sums(ds, wide, query, dim, run, dks + own, rows, first, dim);
            }
            free(packed);
        }
    }
    PRAGMA(omp parallel for schedule(static))
    EACH(row, kv_heads * tokens) {
        float *to_k = dk + row * dim, *to_v = dv + row * dim;
        EACH(g, group) {
            i64 at = ((row / tokens * group + g) * tokens + row % tokens) * dim;
            SIMD EACH(d, dim) {
                to_k[d] = (g ? to_k[d] : 0.0f) + dks[at + d];
                to_v[d] = (g ? to_v[d] : 0.0f) + dvs[at + d];
            }
        }
    }
    return failed;
}
#endif
