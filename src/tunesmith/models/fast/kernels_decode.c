/* One decoding step: one new token of each running row, or pieces of prompts. Each token is a row of the step. Included by
 * kernels.c, once for each type of weights.
 *
 * Between the products, activations are fp32. All threads run through the layers together and wait for one another
 * five times a layer; a starting thread costs more than such a wait. Each thread computes its part of the outputs of
 * a product, and the norms for itself, which is cheaper than to share them if there are few rows.
 */
#ifndef T
/* Sizes of the network and of its cache, in the order in which decode_step.py passes them. */
typedef struct { i64 rows, layers, hidden, heads, kv_heads, dim, inner, vocabulary, capacity, window, rank, read; } Sizes;
/* The factors of the LoRAs on one product, A (rank, in) and B (out, rank) with their scaling; 0 without any. */
typedef struct { const void *a, *b; } Lora;
enum { ON_Q, ON_K, ON_V, ON_O, ON_GATE, ON_UP, ON_DOWN, PRODUCTS };
/* Pointers of one layer, in the order in which decode_step.py passes them; 0 for one that is absent. */
typedef struct {
    const void *norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *o, *o_bias, *mlp_norm, *gate, *up, *down;
    void *keys, *values;
    Lora loras[PRODUCTS];
} Layer;
#define CHUNK 48 /* outputs of a product at a time: they and their weights stay in the cache */
#define FEW_CHUNK 480 /* the same with few rows, where only the order of reading matters */

#define HAS_BLOCKS_f32 1
#define MANY_ROWS 128 /* with more, the threads share the norms as well */

/* Where the threads meet: how many have arrived, how often all have; and the next task of each layer's attention. */
typedef struct { i64 arrived, round, next[]; } Meeting;

/* Rows whose attention is one task for each key head: consecutive tokens of one slot, the first of which sees `seen` tokens. */
typedef struct { i64 first, count, seen; } Block;

/* What a thread needs to know. Activations are (features, wide), a row a column. */
typedef struct {
    const Sizes *n;
    i64 rows, wide, outputs, thread, threads; /* outputs of a product at a time */
    float *x, *qkv, *queries, *chunk, *scores; /* queries (rows, heads, dim), rotated */
    void *normed, *mixed, *product, *low; /* inputs of products, of type A; low: A x of up to three LoRAs */
    const float *keep, *cosine, *sine; /* keep (rank, wide): 1 for the ranks of a row's own adapter, else 0; or absent */
    const i64 *slots, *places;
    const Block *blocks;
    i64 block_count;
    float epsilon, scale;
    Meeting *meeting;
} Step;

/* The part of `count` outputs that a thread computes: [*first, *end), beginning at a multiple of `unit`. */
static inline void own_part(const Step *s, i64 count, i64 unit, i64 *first, i64 *end) {
    i64 part = (count / s->threads + unit - 1) / unit * unit;
    *first = s->thread * part < count ? s->thread * part : count;
    *end = *first + part < count && s->thread + 1 < s->threads ? *first + part : count;
}

/* Wait until all threads are here. A wait that lasts gives the core away, because the thread that is missing may need
 * it: OpenMP's barrier spins for milliseconds, so that next to one busy program a step took a second. */
#define SPINS 2000
static void wait_for_all(const Step *s) {
    Meeting *at = s->meeting;
    i64 round = __atomic_load_n(&at->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&at->arrived, 1, __ATOMIC_ACQ_REL) == s->threads) {
        __atomic_store_n(&at->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&at->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (i64 spins = 0; __atomic_load_n(&at->round, __ATOMIC_ACQUIRE) == round; spins++) {
        if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}
#else

#if !JOIN(HAS_PANELS, SUFFIX) /* these read no weights */
/* out (group, dim) = p (group, seen) v (seen, dim). Fetches what lies `ahead` of v. */
INLINE void F(mix)(const float *p, const T *v, float *out, i64 seen, i64 dim, i64 ahead, int group) {
    i64 d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        V sums[FEW][2] = {{{0}}};
        EACH(j, seen) {
            V low = F(read)(v + j * dim + d), high = F(read)(v + j * dim + d + LANES);
            __builtin_prefetch(v + j * dim + d + ahead, 0, 2);
            UNROLL for (int g = 0; g < group; g++) {
                sums[g][0] += p[g * seen + j] * low;
                sums[g][1] += p[g * seen + j] * high;
            }
        }
        UNROLL for (int g = 0; g < group; g++) memcpy(out + g * dim + d, sums[g], sizeof(sums[g]));
    }
    for (; d < dim; d++) EACH(g, group) {
        float sum = 0.0f;
        EACH(j, seen) sum += p[g * seen + j] * GET(v[j * dim + d]);
        out[g * dim + d] = sum;
    }
}

/* q (group, dim) against `seen` keys of one head -> out (group, value_dim), fp32. `part`: group * seen floats. `next`:
 * how far after these keys and values those of the thread's next call lie, if that is known, else 0; they are fetched
 * while these are multiplied. An AMD Zen 4 core then reads 256 tokens at 15 instead of 8 GB/s. */
static void F(attend_head)(const A *q, const T *k, const T *v, float *out, float *part, i64 group, i64 seen, i64 dim,
                           i64 value_dim, float scale, float softcap, i64 next) {
    if (!next) for (i64 i = 0; i < seen * value_dim; i += 64 / (i64)sizeof(T)) __builtin_prefetch(v + i, 0, 2);
    for (i64 g = 0; g < group; g += FEW)
        F(dots_along)(k, dim, seen, q + g * dim, group - g < FEW ? group - g : FEW, part + g * seen, 1, seen, next);
    EACH(g, group) {
        float top = -INFINITY, sum = 0.0f, *p = part + g * seen;
        SIMD EACH(j, seen) p[j] *= scale;
        if (softcap > 0.0f) EACH(j, seen) p[j] = softcap * tanhf(p[j] / softcap);
        SIMD_MAX(top) EACH(j, seen) top = p[j] > top ? p[j] : top;
        SIMD_SUM(sum) EACH(j, seen) sum += p[j] = fast_exp(p[j] - top);
        float inverse = 1.0f / sum;
        SIMD EACH(j, seen) p[j] *= inverse;
    }
    for (i64 g = 0; g < group; g += FEW) {
        const float *p = part + g * seen;
        float *to = out + g * value_dim;
        if (group - g == 1) F(mix)(p, v, to, seen, value_dim, next, 1);
        else if (group - g == 2) F(mix)(p, v, to, seen, value_dim, next, 2);
        else if (group - g == 3) F(mix)(p, v, to, seen, value_dim, next, 3);
        else F(mix)(p, v, to, seen, value_dim, next, FEW);
    }
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
        float sums[group * value_dim], *part = malloc(sizeof(float) * (size_t)(group * (n - first)));
        A query[group * dim];
        EACH(i, group * dim) query[i] = A_PUT(GET(q[(row * heads + head * group) * dim + i]));
        F(attend_head)(query, keys + at * dim, values + at * value_dim, sums, part, group, n - first, dim, value_dim,
                       scale, softcap, 0);
        EACH(i, group * value_dim) out[(row * heads + head * group) * value_dim + i] = PUT(sums[i]);
        free(part);
    }
}
#endif

/* x / rms(x) * weight of all rows, as inputs of a product. */
static void F(norm_rows)(const Step *s, const void *weight, A *to) {
    const T *w = weight;
    i64 width = s->n->hidden, wide = s->wide, begin = 0, end = width;
    if (wide > MANY_ROWS) own_part(s, width, 16, &begin, &end);
    float sums[wide], some[16 * wide];
    EACH(r, wide) sums[r] = 0.0f;
    EACH(f, width) SIMD EACH(r, wide) sums[r] += s->x[f * wide + r] * s->x[f * wide + r];
    SIMD EACH(r, wide) sums[r] = 1.0f / sqrtf(sums[r] / (float)width + s->epsilon);
    for (i64 f = begin; f < end; f += 16) {
        i64 count = end - f < 16 ? end - f : 16;
        EACH(i, count) SIMD EACH(r, wide) some[i * wide + r] = s->x[(f + i) * wide + r] * sums[r] * GET(w[f + i]);
        F(store_inputs)(some, f, count, to, width, wide);
    }
    if (wide > MANY_ROWS) wait_for_all(s);
}

/* x / rms(x) * weight of one head. */
static void F(norm_head)(float *x, const void *weight, i64 dim, float epsilon) {
    const T *w = weight;
    float sum = 0.0f;
    SIMD_SUM(sum) EACH(i, dim) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / (float)dim + epsilon);
    SIMD EACH(i, dim) x[i] = x[i] * inverse * GET(w[i]);
}

/* Rotate the halves of a head (Su et al. 2021, as in llama): x cos + rotate_half(x) sin. */
static inline void F(rotate)(float *x, const float *cosine, const float *sine, i64 dim) {
    EACH(i, dim / 2) {
        float low = x[i], high = x[dim / 2 + i];
        x[i] = low * cosine[i] - high * sine[i];
        x[dim / 2 + i] = high * cosine[dim / 2 + i] + low * sine[dim / 2 + i];
    }
}

/* This thread's part of keep * A x of `count` LoRAs over the same x (in), as inputs of the products with B. */
static void F(lower)(const Step *s, const Lora *loras, i64 count, const A *x, i64 in) {
    i64 first, end, wide = s->wide, rank = s->n->rank;
    if (!rank) return;
    own_part(s, rank, UNIT, &first, &end);
    EACH(l, count) for (i64 at = first; loras[l].a && at < end; at += s->outputs) {
        i64 n = end - at < s->outputs ? end - at : s->outputs;
        F(factor_dots)((const T *)loras[l].a + at * in, in, n, x, wide, s->chunk);
        if (s->keep) SIMD EACH(i, n * wide) s->chunk[i] *= s->keep[at * wide + i];
        F(store_inputs)(s->chunk, at, n, (A *)s->low + l * rank * wide, rank, wide);
    }
    wait_for_all(s);
}

/* Add B (keep * A x) of LoRA number `l` of those that `lower` has computed to outputs [at, at + n). */
static void F(add_lora)(const Step *s, const Lora *lora, i64 l, i64 at, i64 n, float *y) {
    i64 rank = s->n->rank, wide = s->wide;
    float *sums = s->chunk + 2 * s->outputs * wide;
    if (!rank || !lora->b) return;
    F(factor_dots)((const T *)lora->b + at * rank, rank, n, (const A *)s->low + l * rank * wide, wide, sums);
    SIMD EACH(i, n * wide) y[i] += sums[i];
}

/* This thread's part of y (out, wide) = or += weight (out, in) x + bias + LoRA number `l`. */
static void F(project)(const Step *s, const void *weight, const void *bias, const Lora *lora, i64 l, const A *x, i64 in,
                       i64 out, float *y, int add) {
    const W *w = weight;
    const T *b = bias;
    i64 first, end, wide = s->wide;
    own_part(s, out, UNIT, &first, &end);
    for (i64 at = first; at < end; at += s->outputs) {
        i64 count = end - at < s->outputs ? end - at : s->outputs;
        float *sums = add ? s->chunk : y + at * wide;
        F(dots)(w + at * LINE(in), in, count, x, wide, sums);
        if (b) EACH(i, count) SIMD EACH(r, wide) sums[i * wide + r] += GET(b[at + i]);
        F(add_lora)(s, lora, l, at, count, sums);
        if (add) SIMD EACH(i, count * wide) y[at * wide + i] += sums[i];
    }
}

/* The place of the first token of a row's slot and a key head in keys and values, in tokens. */
static inline i64 F(slot_of)(const Step *s, i64 row, i64 head) {
    return (s->slots[row] * s->n->kv_heads + head) * s->n->capacity;
}

/* Rotate and store the keys of up to 16 rows and one key head, store the values, and rotate the queries that see them. */
static void F(store_rows)(const Step *s, const Layer *layer, i64 first, i64 count, i64 head) {
    const Sizes *n = s->n;
    i64 dim = n->dim, group = n->heads / n->kv_heads, wide = s->wide;
    float some[16 * dim];
    T *keys = layer->keys, *values = layer->values;
    EACH(part, group + 2) {
        i64 at = part < group ? head * group + part : part == group ? n->heads + head : n->heads + n->kv_heads + head;
        swap_axes(s->qkv + at * dim * wide + first, wide, some, dim, dim, count);
        EACH(r, count) {
            i64 row = first + r, place = (F(slot_of)(s, row, head) + s->places[row]) * dim;
            const void *norm = part < group ? layer->q_norm : layer->k_norm;
            float *x = some + r * dim;
            if (part > group) { EACH(i, dim) values[place + i] = PUT(x[i]); continue; }
            if (norm) F(norm_head)(x, norm, dim, s->epsilon);
            F(rotate)(x, s->cosine + row * dim, s->sine + row * dim, dim);
            if (part == group) EACH(i, dim) keys[place + i] = PUT(x[i]);
            else memcpy(s->queries + (row * n->heads + at) * dim, x, sizeof(float) * (size_t)dim);
        }
    }
}

/* Attention of one row and one key head to the tokens of its slot; the result is stored as inputs. `next`: the row of the
 * thread's next task and its key head, or none. */
static void F(attend_row)(const Step *s, const Layer *layer, i64 row, i64 head, i64 next) {
    const Sizes *n = s->n;
    i64 dim = n->dim, group = n->heads / n->kv_heads, seen = s->places[row] + 1;
    i64 first = n->window > 0 && seen > n->window ? seen - n->window : 0, slot = F(slot_of)(s, row, head);
    float heads[group * dim];
    A query[group * dim], *mixed = s->mixed;
    const T *keys = layer->keys, *values = layer->values;
    const float *q = s->queries + (row * n->heads + head * group) * dim;
    if (next >= 0) next = (F(slot_of)(s, next / n->kv_heads, next % n->kv_heads) - slot) * dim;
    EACH(i, group * dim) query[i] = A_PUT(q[i]);
    FT(attend_head)(query, keys + (slot + first) * dim, values + (slot + first) * dim, heads, s->scores, group, seen - first,
                   dim, dim, s->scale, 0.0f, next < 0 ? 0 : next);
    EACH(i, group * dim) mixed[F(input_at)(head * group * dim + i, row, n->heads * dim, s->wide)] = A_PUT(heads[i]);
}
#if JOIN(HAS_BLOCKS, SUFFIX)
/* Attention of the rows of a block and one key head to the tokens of their slot; the result is stored as inputs. Two rows take
 * no longer than one by one, and 8 pieces of 8 rows behind 2,000 tokens take 239 instead of 311 ms. */
static void attend_block(const Step *s, const Layer *layer, const Block *block, i64 head) {
    const Sizes *n = s->n;
    Run run = {0, block->seen + block->count - 1, 0, 0};
    i64 dim = n->dim, group = n->heads / n->kv_heads, all = n->heads * dim, slot = F(slot_of)(s, block->first, head) * dim;
    float *scores = s->scores + round_up_16(run.length + 1) * dim, norms[2 * QUERIES_AT_ONCE], y[QUERIES_AT_ONCE * dim], *mixed = s->mixed;
    pack_keys((const float *)layer->keys + slot, &run, dim, s->scores);
    RANGE(at, head * group, (head + 1) * group) for (i64 i = 0; i < block->count; i += QUERIES_AT_ONCE) {
        i64 rows = least(block->count - i, QUERIES_AT_ONCE), row = block->first + i;
        attend_rows(s->queries + row * all + at * dim, all, s->scores, (const float *)layer->values + slot, &run, scores,
                    score_wide(run.length), s->scale, norms, y, dim, rows, block->seen + i, dim);
        EACH(r, rows) EACH(d, dim) mixed[F(input_at)(at * dim + d, row + r, all, s->wide)] = y[r * dim + d];
    }
}
#endif

/* Cut the rows of a step into blocks; return their number, and in *longest the most keys that a block of several rows has. */
static i64 F(cut)(const Sizes *n, const i64 *slots, const i64 *places, Block *blocks, i64 *longest) {
    i64 count = 0;
    *longest = 0;
    for (i64 row = 0, end; row < n->rows; row = end) {
        for (end = row + 1; end < n->rows && end - row < QUERIES_PER_TASK; end++)
            if (slots[end] != slots[row] || places[end] != places[end - 1] + 1) break;
#if JOIN(HAS_BLOCKS, SUFFIX)
        i64 seen = places[end - 1] + 1;
        if (n->dim % 16 == 0 && end - row > 1 && !(n->window > 0 && n->window < seen)) {
            blocks[count++] = (Block){row, end - row, places[row] + 1};
            *longest = seen > *longest ? seen : *longest;
            continue;
        }
#endif
        for (; row < end; row++) blocks[count++] = (Block){row, 1, places[row] + 1};
    }
    return count;
}

/* This thread's part of silu(gate) * up, as inputs of the last product. */
static void F(gate_and_up)(const Step *s, const Layer *layer) {
    const W *gate = layer->gate, *up = layer->up;
    i64 first, end, wide = s->wide, hidden = s->n->hidden, inner = s->n->inner;
    own_part(s, inner, UNIT, &first, &end);
    for (i64 at = first; at < end; at += s->outputs) {
        i64 count = end - at < s->outputs ? end - at : s->outputs;
        float *g = s->chunk, *u = g + count * wide;
        F(dots)(gate + at * LINE(hidden), hidden, count, s->normed, wide, g);
        F(dots)(up + at * LINE(hidden), hidden, count, s->normed, wide, u);
        F(add_lora)(s, layer->loras + ON_GATE, 0, at, count, g);
        F(add_lora)(s, layer->loras + ON_UP, 1, at, count, u);
        SIMD EACH(i, count * wide) g[i] = g[i] / (1.0f + fast_exp(-g[i])) * u[i];
        F(store_inputs)(g, at, count, s->product, inner, wide);
    }
}

/* A layer as far as its attention. */
static void F(attend)(const Step *s, const Layer *layer, i64 *next) {
    const Sizes *n = s->n;
    const Lora *loras = layer->loras;
    i64 hidden = n->hidden, width = n->heads * n->dim, kv_width = n->kv_heads * n->dim, kv_heads = n->kv_heads;
    float *k = s->qkv + width * s->wide, *v = k + kv_width * s->wide;
    F(norm_rows)(s, layer->norm, s->normed);
    F(lower)(s, loras + ON_Q, 3, s->normed, hidden);
    F(project)(s, layer->q, layer->q_bias, loras + ON_Q, 0, s->normed, hidden, width, s->qkv, 0);
    F(project)(s, layer->k, layer->k_bias, loras + ON_K, 1, s->normed, hidden, kv_width, k, 0);
    F(project)(s, layer->v, layer->v_bias, loras + ON_V, 2, s->normed, hidden, kv_width, v, 0);
    wait_for_all(s);
    for (i64 task = s->thread; task < (n->rows + 15) / 16 * kv_heads; task += s->threads)
        F(store_rows)(s, layer, task / kv_heads * 16, least(16, n->rows - task / kv_heads * 16), task % kv_heads);
    wait_for_all(s);
    for (i64 task; (task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < s->block_count * kv_heads;) {
        i64 then = task + s->threads;
        const Block *block = s->blocks + task / kv_heads;
#if JOIN(HAS_BLOCKS, SUFFIX)
        if (block->count > 1) { attend_block(s, layer, block, task % kv_heads); continue; }
#endif
        F(attend_row)(s, layer, block->first, task % kv_heads,
                      then < s->block_count * kv_heads ? s->blocks[then / kv_heads].first * kv_heads + then % kv_heads : -1);
    }
    wait_for_all(s);
}

/* The rest of the layer. */
static void F(finish)(const Step *s, const Layer *layer) {
    const Sizes *n = s->n;
    const Lora *loras = layer->loras;
    i64 hidden = n->hidden, width = n->heads * n->dim;
    F(lower)(s, loras + ON_O, 1, s->mixed, width);
    F(project)(s, layer->o, layer->o_bias, loras + ON_O, 0, s->mixed, width, hidden, s->x, 1);
    wait_for_all(s);
    F(norm_rows)(s, layer->mlp_norm, s->normed);
    F(lower)(s, loras + ON_GATE, 2, s->normed, hidden);
    F(gate_and_up)(s, layer);
    wait_for_all(s);
    F(lower)(s, loras + ON_DOWN, 1, s->product, n->inner);
    F(project)(s, layer->down, 0, loras + ON_DOWN, 0, s->product, n->inner, hidden, s->x, 1);
    wait_for_all(s);
}

/* Go on with the rows `last` alone: `to` has room for them. */
static void F(keep_rows)(Step *s, const Step *to, const i64 *last) {
    i64 width = s->n->heads * s->n->dim;
    A *mixed = s->mixed, *kept = to->mixed;
    float *keep = (float *)to->keep;
    for (i64 f = s->thread; f < s->n->hidden; f += s->threads) EACH(r, to->rows) to->x[f * to->wide + r] = s->x[f * s->wide + last[r]];
    for (i64 f = s->thread; f < width; f += s->threads)
        EACH(r, to->rows) kept[F(input_at)(f, r, width, to->wide)] = mixed[F(input_at)(f, last[r], width, s->wide)];
    if (keep && !s->thread) EACH(i, s->n->rank) EACH(r, to->rows) keep[i * to->wide + r] = s->keep[i * s->wide + last[r]];
    wait_for_all(s);
    *s = *to;
}

/* This thread's part of logits (rows, vocabulary) = head (vocabulary, hidden) x of the rows of `s`. */
static void F(project_to_logits)(const Step *s, const W *head, float *logits) {
    i64 first, end, wide = s->wide, hidden = s->n->hidden, vocabulary = s->n->vocabulary;
    own_part(s, vocabulary, UNIT, &first, &end);
    for (i64 at = first; at < end; at += s->outputs) {
        i64 count = end - at < s->outputs ? end - at : s->outputs;
        F(dots)(head + at * LINE(hidden), hidden, count, s->normed, wide, s->chunk);
        swap_axes(s->chunk, wide, logits + at, vocabulary, count, s->rows);
    }
}

/* The step of a llama: x (rows, hidden) holds the embeddings; logits (read, vocabulary) of the `read` rows of `last`. A row
 * sees the rows of its slot at smaller places. keep (rows, rank): 1 for the ranks of a row's own adapter, else 0; absent
 * if all are 1. Returns 1 if memory is short. */
i64 F(decode_step)(const float *x, const Layer *layers, const Sizes *n, const T *norm, const W *head, const float *cosine,
                   const float *sine, const i64 *slots, const i64 *places, const i64 *last, const float *keep, float *logits,
                   float epsilon, float scale) {
    i64 wide = WIDE(n->rows), hidden = n->hidden, all = n->heads * n->dim, width = all + 2 * n->kv_heads * n->dim, rank = n->rank;
    i64 outputs = OUTPUTS(wide), wide_read = WIDE(n->read), outputs_read = OUTPUTS(wide_read), longest;
    i64 chunk_size = outputs * wide > outputs_read * wide_read ? outputs * wide : outputs_read * wide_read;
    i64 shared_norm = wide > MANY_ROWS ? hidden * wide : 0, own_norm = hidden * (shared_norm ? wide_read : wide);
    i64 shared = (hidden + width + all + n->inner + 4 * rank) * wide + all * n->rows + shared_norm + (hidden + all + rank) * wide_read;
    Block *blocks = malloc(sizeof(Block) * (size_t)n->rows);
    Meeting *meeting = calloc(1, sizeof(Meeting) + sizeof(i64) * (size_t)n->layers);
    if (!blocks || !meeting) { free(blocks); free(meeting); return 1; }
    i64 block_count = F(cut)(n, slots, places, blocks, &longest), of_rows = n->heads / n->kv_heads * n->capacity;
    i64 of_blocks = longest ? round_up_16(longest + 1) * n->dim + QUERIES_AT_ONCE * score_wide(longest) : 0;
    i64 own = round_up_16(own_norm + 3 * chunk_size + (of_rows > of_blocks ? of_rows : of_blocks)), threads = omp_get_max_threads();
    float *space = calloc((size_t)(shared + threads * own + 16), sizeof(float));
    if (!space) { free(blocks); free(meeting); return 1; }
    float *residual = space, *qkv = residual + hidden * wide, *mixed = qkv + width * wide, *product = mixed + all * wide;
    float *low = product + n->inner * wide, *kept = keep ? low + 3 * rank * wide : 0, *queries = low + 4 * rank * wide;
    float *normed = queries + all * n->rows, *x_read = normed + shared_norm, *mixed_read = x_read + hidden * wide_read;
    if (keep) swap_axes(keep, rank, kept, wide, n->rows, rank);
    swap_axes(x, hidden, residual, wide, n->rows, hidden);
    PRAGMA(omp parallel num_threads(threads))
    {
        float *mine = space + round_up_16(shared) + omp_get_thread_num() * own, *chunk = mine + own_norm;
        Step step = {n, n->rows, wide, outputs, omp_get_thread_num(), omp_get_num_threads(), residual, qkv, queries, chunk,
                     chunk + 3 * chunk_size, shared_norm ? normed : mine, mixed, product, low, kept, cosine, sine, slots, places,
                     blocks, block_count, epsilon, scale, meeting};
        Step read = step;
        read.rows = n->read, read.wide = wide_read, read.outputs = outputs_read, read.x = x_read, read.mixed = mixed_read;
        read.keep = keep ? mixed_read + all * wide_read : 0, read.normed = wide_read > MANY_ROWS ? normed : mine;
        EACH(l, n->layers) {
            F(attend)(&step, layers + l, meeting->next + l);
            if (l + 1 == n->layers && n->read < n->rows) F(keep_rows)(&step, &read, last);
            F(finish)(&step, layers + l);
        }
        F(norm_rows)(&step, norm, step.normed);
        F(project_to_logits)(&step, head, logits);
    }
    free(space);
    free(blocks);
    free(meeting);
    return 0;
}
#endif
