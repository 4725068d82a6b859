/* One decoding step: one new token of each running row, or some tokens of each: a short piece of a prompt. Each token is
 * a row of the step. Included by kernels.c, once for each type of weights.
 *
 * Between the products, activations are fp32. All threads run through the layers together and wait for one another
 * five times a layer; a starting thread costs more than such a wait. Each thread computes its part of the outputs of
 * a product, and the norms for itself, which is cheaper than to share them.
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

/* Where the threads meet: how many have arrived, how often all have; and the next task of each layer's attention. */
typedef struct { i64 arrived, round, next[]; } Meeting;

/* What a thread needs to know. Activations are (features, wide), a row a column. */
typedef struct {
    const Sizes *n;
    i64 rows, wide, outputs, thread, threads; /* outputs of a product at a time */
    float *x, *qkv, *chunk, *scores;
    void *normed, *mixed, *product, *low; /* inputs of products, of type A; low: A x of up to three LoRAs */
    const float *keep, *cosine, *sine; /* keep (rank, wide): 1 for the ranks of a row's own adapter, else 0; or absent */
    const i64 *slots, *places;
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
    i64 width = s->n->hidden, wide = s->wide;
    float sums[wide], some[16 * wide];
    EACH(r, wide) sums[r] = 0.0f;
    EACH(f, width) SIMD EACH(r, wide) sums[r] += s->x[f * wide + r] * s->x[f * wide + r];
    SIMD EACH(r, wide) sums[r] = 1.0f / sqrtf(sums[r] / (float)width + s->epsilon);
    for (i64 f = 0; f < width; f += 16) {
        i64 count = width - f < 16 ? width - f : 16;
        EACH(i, count) SIMD EACH(r, wide) some[i * wide + r] = s->x[(f + i) * wide + r] * sums[r] * GET(w[f + i]);
        F(store_inputs)(some, f, count, to, width, wide);
    }
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

/* The place of the first token of a slot and head in keys and values, in tokens. `task`: row and key head. */
static inline i64 F(slot_of)(const Step *s, i64 task) {
    return (s->slots[task / s->n->kv_heads] * s->n->kv_heads + task % s->n->kv_heads) * s->n->capacity;
}

/* Rotate and store the key, and store the value, of one row and one key head. */
static void F(store_row)(const Step *s, const Layer *layer, i64 task) {
    const Sizes *n = s->n;
    i64 row = task / n->kv_heads, head = task % n->kv_heads, dim = n->dim, at = (F(slot_of)(s, task) + s->places[row]) * dim;
    float key[dim];
    T *keys = layer->keys, *values = layer->values;
    EACH(i, dim) key[i] = s->qkv[((n->heads + head) * dim + i) * s->wide + row];
    EACH(i, dim) values[at + i] = PUT(s->qkv[((n->heads + n->kv_heads + head) * dim + i) * s->wide + row]);
    if (layer->k_norm) F(norm_head)(key, layer->k_norm, dim, s->epsilon);
    F(rotate)(key, s->cosine + row * dim, s->sine + row * dim, dim);
    EACH(i, dim) keys[at + i] = PUT(key[i]);
}

/* Attention of one row and one key head to the tokens of its slot; the result is stored as inputs. */
static void F(attend_row)(const Step *s, const Layer *layer, i64 task) {
    const Sizes *n = s->n;
    i64 row = task / n->kv_heads, head = task % n->kv_heads, then = task + s->threads;
    i64 dim = n->dim, group = n->heads / n->kv_heads, wide = s->wide, seen = s->places[row] + 1;
    i64 first = n->window > 0 && seen > n->window ? seen - n->window : 0;
    i64 slot = F(slot_of)(s, task), next = then < n->rows * n->kv_heads ? (F(slot_of)(s, then) - slot) * dim : 0;
    float heads[group * dim];
    A query[group * dim];
    const T *keys = layer->keys, *values = layer->values;
    EACH(i, group * dim) heads[i] = s->qkv[(head * group * dim + i) * wide + row];
    if (layer->q_norm) EACH(g, group) F(norm_head)(heads + g * dim, layer->q_norm, dim, s->epsilon);
    EACH(g, group) F(rotate)(heads + g * dim, s->cosine + row * dim, s->sine + row * dim, dim);
    EACH(i, group * dim) query[i] = A_PUT(heads[i]);
    FT(attend_head)(query, keys + (slot + first) * dim, values + (slot + first) * dim, heads, s->scores, group, seen - first,
                   dim, dim, s->scale, 0.0f, next);
    A *mixed = s->mixed;
    EACH(i, group * dim) mixed[F(input_at)(head * group * dim + i, row, n->heads * dim, wide)] = A_PUT(heads[i]);
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

static void F(run_layer)(const Step *s, const Layer *layer, i64 *next) {
    const Sizes *n = s->n;
    const Lora *loras = layer->loras;
    i64 hidden = n->hidden, width = n->heads * n->dim, kv_width = n->kv_heads * n->dim;
    float *k = s->qkv + width * s->wide, *v = k + kv_width * s->wide;
    F(norm_rows)(s, layer->norm, s->normed);
    F(lower)(s, loras + ON_Q, 3, s->normed, hidden);
    F(project)(s, layer->q, layer->q_bias, loras + ON_Q, 0, s->normed, hidden, width, s->qkv, 0);
    F(project)(s, layer->k, layer->k_bias, loras + ON_K, 1, s->normed, hidden, kv_width, k, 0);
    F(project)(s, layer->v, layer->v_bias, loras + ON_V, 2, s->normed, hidden, kv_width, v, 0);
    wait_for_all(s);
    for (i64 task = s->thread; task < n->rows * n->kv_heads; task += s->threads) F(store_row)(s, layer, task);
    wait_for_all(s);
    for (i64 task; (task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < n->rows * n->kv_heads;)
        F(attend_row)(s, layer, task);
    wait_for_all(s);
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
    i64 wide = WIDE(n->rows), hidden = n->hidden, width = (n->heads + 2 * n->kv_heads) * n->dim;
    i64 outputs = OUTPUTS(wide), wide_read = WIDE(n->read), outputs_read = OUTPUTS(wide_read);
    i64 chunk_size = outputs * wide > outputs_read * wide_read ? outputs * wide : outputs_read * wide_read;
    i64 shared = (hidden + width + n->heads * n->dim + n->inner + 4 * n->rank) * wide + hidden * wide_read;
    i64 own = round_up_16(hidden * wide + 3 * chunk_size + n->heads / n->kv_heads * n->capacity), threads = omp_get_max_threads();
    float *space = calloc((size_t)(shared + threads * own + 16), sizeof(float));
    Meeting *meeting = calloc(1, sizeof(Meeting) + sizeof(i64) * (size_t)n->layers);
    if (!space || !meeting) { free(space); free(meeting); return 1; }
    float *residual = space, *qkv = residual + hidden * wide, *mixed = qkv + width * wide, *product = mixed + n->heads * n->dim * wide;
    float *low = product + n->inner * wide, *kept = keep ? low + 3 * n->rank * wide : 0;
    float *x_read = low + 4 * n->rank * wide;
    if (keep) swap_axes(keep, n->rank, kept, wide, n->rows, n->rank);
    swap_axes(x, hidden, residual, wide, n->rows, hidden);
    PRAGMA(omp parallel num_threads(threads))
    {
        float *mine = space + round_up_16(shared) + omp_get_thread_num() * own, *chunk = mine + hidden * wide;
        Step step = {n, n->rows, wide, outputs, omp_get_thread_num(), omp_get_num_threads(), residual, qkv, chunk,
                     chunk + 3 * chunk_size, mine, mixed, product, low, kept, cosine, sine, slots, places, epsilon, scale, meeting};
        EACH(l, n->layers) F(run_layer)(&step, layers + l, meeting->next + l);
        if (n->read < n->rows) {
            for (i64 f = step.thread; f < hidden; f += step.threads)
                EACH(r, n->read) x_read[f * wide_read + r] = residual[f * wide + last[r]];
            wait_for_all(&step);
            step.x = x_read, step.rows = n->read, step.wide = wide_read, step.outputs = outputs_read;
        }
        F(norm_rows)(&step, norm, step.normed);
        F(project_to_logits)(&step, head, logits);
    }
    free(space);
    free(meeting);
    return 0;
}
#endif
