/* Draws of tokens from logits, by looking up one uniform number a row in the cumulative distribution. Included by
 * kernels.c, once. One thread computes a row in a fixed order, so a draw depends on its row alone.
 */
#define SUMMED 512 /* weights that are added in fp32; the sums of these blocks are added in fp64 */

/* Keep the weights above `least`, and the first `ties` of those that equal it. */
typedef struct { float least; i64 ties; } Cut;

static int larger_first(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}
static inline i64 bucket_of(float weight) { return (i64)(float_to_bits(weight) >> 16); }

/* Find the smallest set of the largest weights whose number (`counting`) or sum is at least `wanted`. Weights are at
 * most 1; those below `least` are not among the set. `found`: room for n numbers.
 *
 * The upper bits of a positive float order it, so sums by these bits show where the set ends. Only weights with the
 * same upper bits are sorted. */
static Cut find_cut(const float *w, i64 n, float least, double wanted, int counting, float *found) {
    least = least < 1.2e-38f ? 1.2e-38f : least;
    i64 low = bucket_of(least), at = bucket_of(1.0f) - low, count = 0, kept = 0;
    double *sums = calloc((size_t)at + 1, sizeof(double)), before = 0.0;
    EACH(j, n) if (w[j] >= least) sums[bucket_of(w[j]) - low] += counting ? 1.0 : (double)w[j];
    for (; at > 0 && before + sums[at] < wanted; at--) before += sums[at];
    free(sums);
    EACH(j, n) if (bucket_of(w[j]) == at + low) found[count++] = w[j];
    qsort(found, (size_t)count, sizeof(float), larger_first);
    for (; kept < count && before < wanted; kept++) before += counting ? 1.0 : (double)found[kept];
    if (!kept) return (Cut){0.0f, n};
    Cut cut = {found[kept - 1], 0};
    while (cut.ties < kept && found[kept - 1 - cut.ties] == cut.least) cut.ties++;
    return cut;
}
static void keep_largest(float *w, i64 n, Cut cut) {
    i64 ties = 0;
    SIMD EACH(j, n) w[j] = w[j] < cut.least ? 0.0f : w[j];
    EACH(j, n) if (w[j] == cut.least && ties++ >= cut.ties) w[j] = 0.0f;
}
/* Return the sum of w (n), and the sum of each block in `sums`. */
static double sum_blocks(const float *w, i64 n, double *sums) {
    double total = 0.0;
    for (i64 first = 0; first < n; first += SUMMED) {
        float sum = 0.0f;
        i64 end = first + SUMMED < n ? first + SUMMED : n;
        SIMD_SUM(sum) RANGE(j, first, end) sum += w[j];
        total += sums[first / SUMMED] = (double)sum;
    }
    return total;
}
/* Return the first token whose cumulative weight is above `target`; if rounding leaves none, the last with any weight. */
static i64 look_up(const float *w, i64 n, const double *sums, double target) {
    i64 block = 0, token = 0;
    for (i64 b = 0; b * SUMMED < n; b++) {
        if (!(sums[b] > 0.0)) continue;
        if (b) target -= sums[block];
        block = b;
        if (target < sums[b]) break;
    }
    for (i64 j = block * SUMMED; j < n && j < (block + 1) * SUMMED; j++) {
        if (!(w[j] > 0.0f)) continue;
        token = j;
        target -= w[j];
        if (target < 0.0) break;
    }
    return token;
}
/* Draw a token for each row of `scores` (rows, n) under temperature, top_k, top_p and min_p, in this order. `logits`
 * are the model's own, for `logprobs`; they may be `scores`. A filter of 0 (top_p: 1) is off. */
void draw_tokens(const float *logits, const float *scores, const double *uniform, i64 *tokens, float *logprobs,
                 float *rule_logprobs, float temperature, float top_p, float min_p, i64 top_k, i64 rows, i64 n) {
    PRAGMA(omp parallel) {
        float *w = malloc(2 * sizeof(float) * (size_t)n), *room = w + n;
        double sums[n / SUMMED + 1];
        PRAGMA(omp for schedule(static)) EACH(r, rows) {
            const float *own = logits + r * n, *x = scores + r * n;
            float top = -INFINITY, largest = -INFINITY;
            SIMD_MAX(top) EACH(j, n) top = x[j] > top ? x[j] : top;
            SIMD EACH(j, n) w[j] = fast_exp((x[j] - top) / temperature);
            if (0 < top_k && top_k < n) {
                Cut cut = find_cut(w, n, 0.0f, (double)top_k, 1, room);
                keep_largest(w, n, (Cut){cut.least, n}); /* all that are as likely as the last */
            }
            if (top_p < 1.0f) {
                double all = sum_blocks(w, n, sums); /* less likely tokens than `least` have less than 1 - top_p */
                float least = (float)(0.99 * (1.0 - (double)top_p) * all / (double)n);
                keep_largest(w, n, find_cut(w, n, least, (double)top_p * all, 0, room));
            }
            if (min_p > 0.0f) SIMD EACH(j, n) w[j] = w[j] < min_p ? 0.0f : w[j];
            double total = sum_blocks(w, n, sums);
            i64 token = look_up(w, n, sums, uniform[r] * total);
            tokens[r] = token;
            rule_logprobs[r] = (float)log((double)w[token] / total);
            float sum = 0.0f;
            SIMD_MAX(largest) EACH(j, n) largest = own[j] > largest ? own[j] : largest;
            SIMD_SUM(sum) EACH(j, n) sum += fast_exp(own[j] - largest);
            logprobs[r] = own[token] - largest - logf(sum);
        }
        free(w);
    }
}
