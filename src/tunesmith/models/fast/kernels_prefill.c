/* Causal attention of the new tokens of a prompt to all tokens of its slot. Included by kernels.c, once for each type.
 *
 * A block of queries lies side by side, as rows of a decoding step do, and its products are those of a step, with keys
 * and transposed values in the place of weights. So no length of a prompt needs code of its own: oneDNN compiles and
 * keeps 0.6 MB for each of them.
 */
#ifndef T
#define QUERIES 64 /* of a block: more waste products with keys that their mask hides */
#else
#if !JOIN(HAS_PANELS, SUFFIX)

/* What the blocks of a prompt share: strides in numbers from one head to the next, and from one token to the next. */
#ifndef HAS_PROMPT
#define HAS_PROMPT
typedef struct { i64 heads, kv_heads, rows, seen, dim, value_dim, q_head, q_row, k_head, v_head, window; float scale, softcap; } Prompt;

/* scores (keys, wide) -> softmax of each column, in place; column r sees key j if base + r - window < j <= base + r. */
static void softmax_of_columns(const Prompt *p, float *scores, i64 keys, i64 base, i64 wide) {
    float top[wide], sum[wide];
    EACH(r, wide) top[r] = -INFINITY, sum[r] = 0.0f;
    EACH(j, keys) {
        float *s = scores + j * wide;
        i64 low = j > base ? j - base : 0, high = p->window > 0 && j - base + p->window < wide ? j - base + p->window : wide;
        low = low < wide ? low : wide;
        high = high > low ? high : low;
        SIMD EACH(r, wide) s[r] *= p->scale;
        if (p->softcap > 0.0f) EACH(r, wide) s[r] = p->softcap * tanhf(s[r] / p->softcap);
        EACH(r, low) s[r] = -INFINITY;
        RANGE(r, high, wide) s[r] = -INFINITY;
        SIMD EACH(r, wide) top[r] = s[r] > top[r] ? s[r] : top[r];
    }
    EACH(j, keys) SIMD EACH(r, wide) {
        float e = fast_exp(scores[j * wide + r] - top[r]);
        scores[j * wide + r] = e;
        sum[r] += e;
    }
    SIMD EACH(r, wide) sum[r] = 1.0f / sum[r];
    EACH(j, keys) SIMD EACH(r, wide) scores[j * wide + r] *= sum[r];
}
#endif

/* y (columns, wide) = x (rows, columns) transposed; the rest of each row of y stays. */
static void F(turn)(const T *x, i64 x_wide, T *y, i64 wide, i64 rows, i64 columns) {
    float some[16 * columns], turned[16 * columns];
    for (i64 first = 0; first < rows; first += 16) {
        i64 n = rows - first < 16 ? rows - first : 16;
        EACH(r, n) SIMD EACH(c, columns) some[r * columns + c] = GET(x[(first + r) * x_wide + c]);
        swap_axes(some, columns, turned, 16, n, columns);
        EACH(c, columns) SIMD EACH(r, n) y[c * wide + first + r] = PUT(turned[c * 16 + r]);
    }
}

/* Attention of queries [first, first + count) of the heads that share a key head. k, v: the first key and value. */
static void F(attend_block)(const Prompt *p, const T *q, const T *k, const T *v, T *out, i64 first, i64 count, float *space) {
    i64 wide = padded_rows(count), base = p->seen - p->rows + first, keys = base + count, even = (keys + 1) / 2 * 2;
    i64 largest = p->dim > p->value_dim ? p->dim : p->value_dim;
    float *scores = space, *turned = scores + even * wide;
    A *inputs = (A *)(turned + largest * wide);
    T *values = (T *)(inputs + (even > p->dim ? even : p->dim) * wide), *query = values + p->value_dim * even;
    F(turn)(v, p->value_dim, values, even, keys, p->value_dim);
    if (keys < even) EACH(d, p->value_dim) values[d * even + keys] = 0;
    EACH(g, p->heads / p->kv_heads) {
        F(turn)(q + g * p->q_head + first * p->q_row, p->q_row, query, wide, count, p->dim);
        EACH(f, p->dim) EACH(r, wide) turned[f * wide + r] = r < count ? GET(query[f * wide + r]) : 0.0f;
        F(store_inputs)(turned, 0, p->dim, inputs, p->dim, wide);
        F(dots)(k, p->dim, keys, inputs, wide, scores);
        softmax_of_columns(p, scores, keys, base, wide);
        if (keys < even) EACH(r, wide) scores[keys * wide + r] = 0.0f;
        F(store_inputs)(scores, 0, even, inputs, even, wide);
        F(dots)(values, even, p->value_dim, inputs, wide, turned);
        EACH(r, count) EACH(d, p->value_dim) out[((first + r) * p->heads + g) * p->value_dim + d] = PUT(turned[d * wide + r]);
    }
}

/* q (heads, rows, dim), of which `head` and `row` numbers lie from one to the next; keys and values (kv_heads, ...) of one
 * slot, whose last `rows` of `seen` tokens the queries are -> out (rows, heads, value_dim). dim is even. Returns 1 if
 * memory is short. */
i64 F(prefill_attention)(const T *q, const T *keys, const T *values, T *out, float scale, float softcap, i64 window, i64 heads,
                         i64 kv_heads, i64 rows, i64 seen, i64 dim, i64 value_dim, i64 q_head, i64 q_row, i64 k_head,
                         i64 v_head) {
    Prompt p = {heads, kv_heads, rows, seen, dim, value_dim, q_head, q_row, k_head, v_head, window, scale, softcap};
    i64 blocks = (rows + QUERIES - 1) / QUERIES, group = heads / kv_heads, longest = seen + 2 > dim ? seen + 2 : dim;
    i64 size = QUERIES * (2 * longest + 2 * dim + value_dim) + value_dim * (seen + 2), failed = 0;
    PRAGMA(omp parallel for schedule(dynamic) reduction(| : failed))
    EACH(task, blocks * kv_heads) {
        i64 first = (blocks - 1 - task / kv_heads) * QUERIES, head = task % kv_heads; /* the longest blocks first */
        float *space = malloc(sizeof(float) * (size_t)size);
        if (!space) { failed = 1; continue; }
        F(attend_block)(&p, q + head * group * q_head, keys + head * k_head, values + head * v_head,
                        out + head * group * value_dim, first, rows - first < QUERIES ? rows - first : QUERIES, space);
        free(space);
    }
    return failed;
}
#endif
#endif
