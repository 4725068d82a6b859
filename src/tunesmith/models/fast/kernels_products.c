/* Products of the rows of a decoding step with weights as they are stored, (out, in). Included by kernels.c, once
 * for each type of weights. Sums are fp32. No copy of the weights is made, because they change between steps of
 * training, and because a step takes at least the time of reading them once.
 *
 * At most ALONG rows lie one after another, and a product runs along the inputs. More rows lie side by side: one
 * register holds the same input of LANES rows, and is multiplied by one weight that is broadcast to all lanes. The
 * rows are padded with zeros. With 8 lanes, rows lie side by side in strips of 16, and the rest in one of 8: if all lay side
 * by side, the next input of the same rows would be so far away that most places of the level-1 cache stay empty (a step of
 * 64 rows took 163 instead of 138 ms, one of 128 tokens of a prompt 302 instead of 221). Inputs are `A`: bf16 where the
 * processor multiplies pairs of bf16 and adds them in fp32 (PAIRS), else fp32.
 *
 * The forms with panels read copies of the weights that are smaller and laid out so that widening them in a register
 * costs little. Rows of inputs then lie one after another. The mixed form multiplies fp32 inputs by bf16 copies of fp32
 * weights, where the copies lose nothing (`pack_panels`). The int8 forms multiply inputs of a network in fp32 or bf16 by
 * weights that were rounded to int8 (`pack_int8`).
 */
#ifndef T
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define FEW 4
#define INLINE static inline __attribute__((always_inline))
#define UNROLL PRAGMA(GCC unroll 16)
#define HIDE(pointer) __asm__("" : "+r"(pointer))
typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint16_t VS __attribute__((vector_size(2 * LANES)));
typedef float V8 __attribute__((vector_size(32)));
typedef uint32_t VI8 __attribute__((vector_size(32)));
#define PAIRS_f32 0
#define PAIRS_mixed 0
#define PAIRS_int8_f32 0
#define PAIRS_int8_bf16 PAIRS_bf16
#define ALONG_f32 FEW
#define HALF_f32 0
#define HALF_bf16 1
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define PAIRS_bf16 1
#define ALONG_bf16 15 /* a product along the inputs reads the weights once for MANY rows */
#define MANY 8
INLINE V pairs_add(V sum, VI a, VI b) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE V8 pairs_add_8(V8 sum, VI8 a, VI8 b) { return (V8)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b); }
/* The sums of 16 registers, each in the lane of its number. */
INLINE V sums_of_16(const V *x) {
    __m512 parts[4];
    UNROLL for (int i = 0; i < 4; i++) { /* part j of parts[i]: four partial sums of register 4 j + i */
        __m512 a = (__m512)x[i], b = (__m512)x[4 + i], c = (__m512)x[8 + i], d = (__m512)x[12 + i];
        a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        c = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        parts[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xDD));
    }
    UNROLL for (int i = 0; i < 4; i += 2)
        parts[i] = _mm512_add_ps(_mm512_unpacklo_ps(parts[i], parts[i + 1]), _mm512_unpackhi_ps(parts[i], parts[i + 1]));
    __m512d a = (__m512d)parts[0], b = (__m512d)parts[2];
    return (V)_mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
}
#else
#define PAIRS_bf16 0
#define ALONG_bf16 FEW
#endif
i64 vector_floats(void) { return LANES; }
/* LANES numbers of int8, widened to fp32. */
INLINE V widen_int8(const int8_t *w) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
#else
    V lanes;
    EACH(i, LANES) lanes[i] = w[i];
    return lanes;
#endif
}
INLINE float sum_lanes(V x) {
#if defined(__AVX__)
#if LANES == 16
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
#else
    __m256 half = (__m256)x;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float sum = 0.0f;
    EACH(i, LANES) sum += x[i];
    return sum;
#endif
}
/* y (columns, rows) = x (rows, columns) transposed, with `x_wide` and `y_wide` floats from one row to the next. */
typedef float V4 __attribute__((vector_size(16)));
typedef int32_t M4 __attribute__((vector_size(16)));
static void swap_axes(const float *x, i64 x_wide, float *y, i64 y_wide, i64 rows, i64 columns) {
    i64 i = 0;
    for (; i + 4 <= rows; i += 4) {
        i64 j = 0;
        for (; j + 4 <= columns; j += 4) {
            V4 a[4], b[4], c[4];
            UNROLL for (int n = 0; n < 4; n++) memcpy(&a[n], x + (i + n) * x_wide + j, 16);
            UNROLL for (int n = 0; n < 2; n++) {
                b[n] = __builtin_shuffle(a[2 * n], a[2 * n + 1], (M4){0, 4, 1, 5});
                b[2 + n] = __builtin_shuffle(a[2 * n], a[2 * n + 1], (M4){2, 6, 3, 7});
            }
            UNROLL for (int n = 0; n < 2; n++) {
                c[2 * n] = __builtin_shuffle(b[2 * n], b[2 * n + 1], (M4){0, 1, 4, 5});
                c[2 * n + 1] = __builtin_shuffle(b[2 * n], b[2 * n + 1], (M4){2, 3, 6, 7});
            }
            UNROLL for (int n = 0; n < 4; n++) memcpy(y + (j + n) * y_wide + i, &c[n], 16);
        }
        for (; j < columns; j++) EACH(n, 4) y[j * y_wide + i + n] = x[(i + n) * x_wide + j];
    }
    for (; i < rows; i++) EACH(j, columns) y[j * y_wide + i] = x[i * x_wide + j];
}
/* The largest of each row of logits (rows, vocabulary), the first of several, and log(sum(exp(row))). */
void largest_and_logsumexp(const float *logits, i64 *largest, float *logsumexp, i64 rows, i64 vocabulary) {
    PRAGMA(omp parallel for schedule(static) if (rows > 1))
    EACH(r, rows) {
        const float *row = logits + r * vocabulary;
        float top = -INFINITY, sum = 0.0f;
        i64 at = 0;
        SIMD_MAX(top) EACH(j, vocabulary) top = row[j] > top ? row[j] : top;
        SIMD_SUM(sum) EACH(j, vocabulary) sum += fast_exp(row[j] - top);
        while (at + 1 < vocabulary && row[at] != top) at++;
        largest[r] = at;
        logsumexp[r] = top + logf(sum);
    }
}
/* A panel holds PANEL outputs, one input after another; the two halves of the outputs are the lower and the upper
 * halves of 32-bit numbers. TALL: rows that are multiplied by a panel at a time. */
#define PANEL (2 * LANES)
#define TALL (LANES == 16 ? 12 : 6)
#define GROUP (8 * TALL) /* rows whose outputs are transposed at once */
/* Bytes of weights that are fetched before they are needed. One or two rows read weights faster than that: the
 * processor's own prefetching is then disturbed (an AMD Zen 4 core read 19 instead of 24 GB/s). From three rows on, it
 * ends before the weights are multiplied (8 rows took 46 instead of 27 ms with panels, and 23 instead of 16 ms without
 * in bf16, where half the distance took 19). */
#define AHEAD 4096
#define WAITS(rows) ((rows) > 2)

/* w (outputs, in) -> panels of bf16, the last one padded with zeros, where nothing is lost: if the lower half of a
 * number is not 0, *exact = 0, and the panels are not complete. */
void pack_panels(const float *w, uint32_t *panels, i64 outputs, i64 in, i64 *exact) {
    i64 count = (outputs + PANEL - 1) / PANEL;
    int lost = 0;
    PRAGMA(omp parallel for schedule(static) reduction(| : lost))
    EACH(p, count) {
        float tile[16 * PANEL];
        uint32_t lower = 0, *to = panels + p * LANES * in;
        i64 rows = outputs - p * PANEL < PANEL ? outputs - p * PANEL : PANEL;
        if (lost) continue;
        memset(tile, 0, sizeof(tile));
        for (i64 start = 0; start < in; start += 16) {
            i64 some = in - start < 16 ? in - start : 16;
            swap_axes(w + p * PANEL * in + start, in, tile, PANEL, rows, some);
            EACH(k, some) {
                VI low, high;
                memcpy(&low, tile + k * PANEL, sizeof(VI));
                memcpy(&high, tile + k * PANEL + LANES, sizeof(VI));
                VI both = low >> 16 | (high & 0xFFFF0000u), rest = (low | high) & 0xFFFFu;
                memcpy(to + (start + k) * LANES, &both, sizeof(VI));
                EACH(j, LANES) lower |= rest[j];
            }
        }
        lost |= lower != 0;
    }
    *exact = !lost;
}
#define STRIP_NUMBERS (1 << 16) /* of the inputs of strips that stay in the cache: 256 KB */
/* Rows with their padding: how many numbers lie side by side. */
static inline i64 padded_rows(i64 rows) {
    return (rows + 7) / 8 * 8;
}
#else

#undef A
#undef A_PUT
#undef A_GET
#undef STEP
#undef LINE
#undef WIDE
#undef UNIT
#undef OUTPUTS
#undef IN_STRIPS
#if JOIN(PAIRS, SUFFIX)
#define A uint16_t
#define A_PUT put_bf16
#define A_GET get_bf16
#define STEP (2 * LANES)
#else
#define A float
#define A_PUT put_f32
#define A_GET get_f32
#define STEP LANES
#endif

#if JOIN(HAS_PANELS, SUFFIX)
#define WIDE(rows) (rows)
#define UNIT PANEL
#define OUTPUTS(wide) ((wide) > FEW ? 64 : FEW_CHUNK)
#if JOIN(IS_INT8, SUFFIX)
#define LINE(in) ((in) + (i64)sizeof(float)) /* numbers of an output: its weights and its scale */
#else
#define LINE(in) (in)
#endif
#define AT_ONCE (JOIN(PAIRS, SUFFIX) ? 2 : 1) /* inputs of one multiplication */

INLINE i64 F(input_at)(i64 f, i64 r, i64 in, i64 wide) { (void)wide; return r * in + f; }

static void F(store_inputs)(const float *from, i64 first, i64 count, A *to, i64 in, i64 wide) {
#if JOIN(PAIRS, SUFFIX)
    EACH(r, wide) EACH(f, count) to[r * in + first + f] = A_PUT(from[f * wide + r]);
#else
    swap_axes(from, wide, to + first, in, count, wide);
#endif
}

/* The weights of AT_ONCE inputs from w on, for the lower and the upper half of a panel's outputs. */
INLINE void F(read_panel)(const W *w, VI *low, VI *high) {
#if !JOIN(IS_INT8, SUFFIX)
    VI both;
    memcpy(&both, w, sizeof(both));
    *low = both << 16;
    *high = both & 0xFFFF0000u;
#else
    *low = (VI)widen_int8(w);
    *high = (VI)widen_int8(w + LANES);
#if JOIN(PAIRS, SUFFIX) /* each int8 is a bf16 number */
    *low = *low >> 16 | (VI)widen_int8(w + PANEL);
    *high = *high >> 16 | (VI)widen_int8(w + PANEL + LANES);
#endif
#endif
}

/* y (rows, PANEL) = x (rows, in) times one panel, `steps` multiplications at a time in sums of their own: one sum alone
 * waits for each addition to end. */
INLINE void F(multiply_panel)(const W *panel, i64 in, const A *x, float *y, int rows, int steps) {
    V sums[4][TALL][2] = {{{{0}}}};
    const A *at[TALL / 3]; /* one pointer for three rows, hidden from the compiler, which else spills all offsets */
    UNROLL for (int j = 0; j < (rows + 2) / 3; j++) { at[j] = x + 3 * j * in; HIDE(at[j]); }
#if JOIN(PAIRS, SUFFIX)
#define ADD(sum, weights, row)                                 \
    {                                                          \
        uint32_t pair;                                         \
        memcpy(&pair, row, sizeof(pair));                      \
        sum = pairs_add(sum, weights, (VI){0} + pair);         \
    }
#else
#define ADD(sum, weights, row) sum += (V)(weights) * *(row);
#endif
#define MULTIPLY(step)                                                                      \
    {                                                                                       \
        VI low, high;                                                                       \
        i64 place = k + step * AT_ONCE;                                                     \
        F(read_panel)(panel + place * PANEL, &low, &high);                                  \
        if (WAITS(rows)) __builtin_prefetch((const char *)(panel + place * PANEL) + AHEAD, 0, 2); \
        UNROLL for (int r = 0; r < rows; r++) {                                             \
            const A *row = at[r / 3] + r % 3 * in + place;                                  \
            ADD(sums[step][r][0], low, row)                                                 \
            ADD(sums[step][r][1], high, row)                                                \
        }                                                                                   \
    }
    i64 k = 0;
    for (; k + steps * AT_ONCE <= in; k += steps * AT_ONCE) UNROLL for (int step = 0; step < steps; step++) MULTIPLY(step)
    for (; k < in; k += AT_ONCE) MULTIPLY(0)
#undef MULTIPLY
#undef ADD
    UNROLL for (int step = 1; step < steps; step++)
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int half = 0; half < 2; half++) sums[0][r][half] += sums[step][r][half];
#if JOIN(IS_INT8, SUFFIX)
    V scales[2];
    memcpy(scales, panel + in * PANEL, sizeof(scales));
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int half = 0; half < 2; half++) sums[0][r][half] *= scales[half];
#endif
    UNROLL for (int r = 0; r < rows; r++) memcpy(y + r * PANEL, sums[0][r], sizeof(sums[0][r]));
}

/* y (wide, PANEL) = x (wide, in) times one panel, in tiles of about equal height. Tiles of four rows wait for their
 * additions; five and three rows take less time than twice four. */
static void F(panel_rows)(const W *panel, i64 in, const A *x, i64 wide, float *y) {
    i64 tiles = (wide + TALL - 1) / TALL, tall = (wide + tiles - 1) / tiles;
    if (tall == 4 && tiles > 1) tall = 5;
#define ROWS(rows, steps) case rows: F(multiply_panel)(panel, in, x + r * in, y + r * PANEL, rows, steps); break;
    for (i64 r = 0; r < wide; r += tall) switch (r + tall < wide ? tall : wide - r) {
        ROWS(1, 4) ROWS(2, 2) ROWS(3, 2) ROWS(4, 1) ROWS(5, 1)
#if LANES == 16
        ROWS(6, 1) ROWS(7, 1) ROWS(8, 1) ROWS(9, 1) ROWS(10, 1) ROWS(11, 1)
#endif
        default: F(multiply_panel)(panel, in, x + r * in, y + r * PANEL, TALL, 1);
    }
#undef ROWS
}

/* out (count, wide) = w x^T for the panels of `count` outputs and x (wide, in). */
static void F(dots)(const W *w, i64 in, i64 count, const A *x, i64 wide, float *out) {
    float y[GROUP * PANEL];
    for (i64 i = 0; i < count; i += PANEL) for (i64 r = 0; r < wide; r += GROUP) {
        i64 rows = wide - r < GROUP ? wide - r : GROUP;
        F(panel_rows)(w + i * LINE(in), in, x + r * in, rows, y);
        swap_axes(y, PANEL, out + i * wide + r, wide, rows, count - i < PANEL ? count - i : PANEL);
    }
}

/* The same for a factor of a LoRA, which lies as it is stored. */
static void F(factor_dots)(const T *w, i64 in, i64 count, const A *x, i64 wide, float *out) {
    for (i64 r = 0; r < wide; r += FEW) FT(dots_along)(w, in, count, x + r * in, wide - r < FEW ? wide - r : FEW, out + r, wide, 1, 0);
}
#undef AT_ONCE
#else
#define LINE(in) (in)
#define IN_STRIPS (LANES == 8)
#define IS_ALONG(rows) ((rows) <= JOIN(ALONG, SUFFIX))
#define WIDE(rows) (IS_ALONG(rows) ? (rows) : padded_rows(rows))
#define UNIT 8
#define OUTPUTS(wide) (IS_ALONG(wide) ? FEW_CHUNK : CHUNK)
#define factor_dots_f32 dots_f32
#define factor_dots_bf16 dots_bf16

/* The place of input `f` of row `r` among `wide` rows of `in` inputs. */
INLINE i64 F(input_at)(i64 f, i64 r, i64 in, i64 wide) {
    if (IS_ALONG(wide)) return r * in + f;
    if (IN_STRIPS) return r / 16 * 16 * in + f * least(16, wide - r / 16 * 16) + r % 16;
    return JOIN(PAIRS, SUFFIX) ? ((f >> 1) * wide + r) * 2 + (f & 1) : f * wide + r;
}

/* Store `count` (even, or the last) inputs from `first` on, given as (count, wide). */
static void F(store_inputs)(const float *from, i64 first, i64 count, A *to, i64 in, i64 wide) {
    if (IS_ALONG(wide)) {
        EACH(r, wide) EACH(f, count) to[r * in + first + f] = A_PUT(from[f * wide + r]);
        return;
    }
#if JOIN(PAIRS, SUFFIX)
    for (i64 f = 0; f < count; f += 2) {
        const float *low = from + f * wide, *high = low + wide;
        uint32_t *pairs = (uint32_t *)(to + (first + f) * wide);
        SIMD EACH(r, wide) pairs[r] = (uint32_t)put_bf16(low[r]) | (uint32_t)put_bf16(high[r]) << 16;
    }
#else
    for (i64 r = 0, strip = 0; strip = least(IN_STRIPS ? 16 : wide, wide - r), r < wide; r += strip)
        EACH(f, count) memcpy(to + r * in + (first + f) * strip, from + f * wide + r, sizeof(float) * (size_t)strip);
#endif
}

INLINE V F(read)(const W *w) {
#if JOIN(HALF, SUFFIX)
    VS halves;
    memcpy(&halves, w, sizeof(halves));
    return (V)(__builtin_convertvector(halves, VI) << 16);
#else
    V lanes;
    memcpy(&lanes, w, sizeof(lanes));
    return lanes;
#endif
}

/* out[i * w_stride + r * x_stride] = w row i . x row r, for `tall` rows of w, `gap` apart, and `rows` of x. What lies
 * `ahead` of each number of w is fetched, if that is not 0. */
INLINE void F(along)(const W *w, i64 gap, i64 in, const A *x, float *out, i64 w_stride, i64 x_stride, i64 ahead, int tall,
                     int rows) {
    V sums[2][FEW] = {{{0}}};
    i64 k = 0;
    for (; k + STEP <= in; k += STEP)
        UNROLL for (int i = 0; i < tall; i++) UNROLL for (int r = 0; r < rows; r++) {
            if (!r && ahead) __builtin_prefetch(w + i * gap + k + ahead, 0, 2);
#if JOIN(PAIRS, SUFFIX)
            VI inputs, weights;
            memcpy(&weights, w + i * gap + k, sizeof(VI));
            memcpy(&inputs, x + r * in + k, sizeof(VI));
            sums[i][r] = pairs_add(sums[i][r], weights, inputs);
#else
            V inputs;
            memcpy(&inputs, x + r * in + k, sizeof(V));
            sums[i][r] += F(read)(w + i * gap + k) * inputs;
#endif
        }
    UNROLL for (int i = 0; i < tall; i++) UNROLL for (int r = 0; r < rows; r++) {
        float sum = sum_lanes(sums[i][r]);
        for (i64 rest = k; rest < in; rest++) sum += GET(w[i * gap + rest]) * A_GET(x[r * in + rest]);
        out[i * w_stride + r * x_stride] = sum;
    }
}

/* The same for `count` rows of w and `rows` <= FEW rows of x. w is read as two streams, each in the order of memory:
 * four neighbouring rows at once are read at less than half the speed (11 instead of 27 GB/s on an AMD Zen 4 core). */
static void F(dots_along)(const W *w, i64 in, i64 count, const A *x, i64 rows, float *out, i64 w_stride, i64 x_stride,
                          i64 ahead) {
    i64 half = count / 2;
#define ROWS(rows)                                                                                                       \
    EACH(i, half) F(along)(w + i * in, half * in, in, x, out + i * w_stride, half * w_stride, x_stride, ahead, 2, rows); \
    if (count % 2) F(along)(w + 2 * half * in, 0, in, x, out + 2 * half * w_stride, 0, x_stride, ahead, 1, rows);
    if (rows == 1) { ROWS(1) }
    else if (rows == 2) { ROWS(2) }
    else if (rows == 3) { ROWS(3) }
    else { ROWS(4) }
#undef ROWS
}

#if JOIN(PAIRS, SUFFIX)
/* The same for two rows of w, whose outputs are `stride` apart, and `rows` <= MANY rows of x: sums of their own keep
 * the processor busy, and are added up together. */
INLINE void F(along_many)(const W *w, i64 gap, i64 in, const A *x, float *out, i64 stride, int rows) {
    V sums[2 * MANY] = {{0}};
    const W *from[2] = {w, w + gap};
    const A *at[3]; /* as in TILE */
    i64 k = 0;
    UNROLL for (int i = 0; i < 2; i++) HIDE(from[i]);
    UNROLL for (int j = 0; j < (rows + 2) / 3; j++) { at[j] = x + 3 * j * in; HIDE(at[j]); }
    for (; k + STEP <= in; k += STEP) {
        VI weights[2];
        UNROLL for (int i = 0; i < 2; i++) {
            memcpy(&weights[i], from[i], sizeof(VI));
            __builtin_prefetch((const char *)from[i] + AHEAD, 0, 2);
            from[i] += STEP;
        }
        UNROLL for (int r = 0; r < rows; r++) {
            VI inputs;
            memcpy(&inputs, at[r / 3] + r % 3 * in, sizeof(VI));
            UNROLL for (int i = 0; i < 2; i++) sums[i * MANY + r] = pairs_add(sums[i * MANY + r], weights[i], inputs);
        }
        UNROLL for (int j = 0; j < (rows + 2) / 3; j++) at[j] += STEP;
    }
    V all = sums_of_16(sums);
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int r = 0; r < rows; r++) {
        float sum = all[i * MANY + r];
        for (i64 rest = k; rest < in; rest++) sum += GET(w[i * gap + rest]) * A_GET(x[r * in + rest]);
        out[i * stride + r] = sum;
    }
}

/* In functions of their own, because the compiler keeps the sums of several loops in one function in memory. */
#define ROWS(rows)                                                                                                       \
    static __attribute__((noinline)) void F(along_##rows)(const W *w, i64 gap, i64 in, const A *x, float *out, i64 stride) { \
        F(along_many)(w, gap, in, x, out, stride, rows);                                                                 \
    }
ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#undef ROWS

/* out (count, wide) = w (count, in) x^T for more than FEW rows of x, which lie one after another. Each pair of rows of
 * w stays in the cache while groups of about equally many rows of x are multiplied by it. */
static void F(dots_along_many)(const W *w, i64 in, i64 count, const A *x, i64 wide, float *out) {
    i64 half = count / 2, groups = (wide + MANY - 1) / MANY, part = (wide + groups - 1) / groups;
#define ROWS(rows) case rows: F(along_##rows)(w + at * in, gap * in, in, x + r * in, out + at * wide + r, gap * wide); break;
    EACH(i, half + count % 2) { /* the last row of an odd number is computed twice */
        i64 at = i < half ? i : count - 1, gap = i < half ? half : 0;
        for (i64 r = 0; r < wide; r += part) switch (r + part < wide ? part : wide - r) {
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
        }
    }
#undef ROWS
}
#endif

/* out[i * wide + r] = w row i . x row r, for `tall` rows of w and `vectors` vectors of rows, which lie side by side, with `gap`
 * numbers from one input to the next. */
#if JOIN(PAIRS, SUFFIX)
#define MULTIPLY(V, VI, PAIRS_ADD)                                                                       \
    VI inputs[4];                                                                                        \
    UNROLL for (int v = 0; v < vectors; v++)                                                             \
        memcpy(&inputs[v], x + k * gap + v * (i64)(sizeof(V) / 2), sizeof(VI));                         \
    UNROLL for (int i = 0; i < tall; i++) {                                                              \
        uint32_t pair;                                                                                   \
        memcpy(&pair, at[i / 3] + i % 3 * in, 4);                                                               \
        VI weights = (VI){0} + pair;                                                                     \
        UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = PAIRS_ADD(sums[i][v], weights, inputs[v]); \
    }
#elif JOIN(HALF, SUFFIX)
#define MULTIPLY(V, VI, PAIRS_ADD)                                                                              \
    V low[4], high[4];                                                                                          \
    UNROLL for (int v = 0; v < vectors; v++) {                                                                  \
        memcpy(&low[v], x + k * gap + v * (i64)(sizeof(V) / 4), sizeof(V));                                    \
        memcpy(&high[v], x + (k + 1) * gap + v * (i64)(sizeof(V) / 4), sizeof(V));                             \
    }                                                                                                           \
    UNROLL for (int i = 0; i < tall; i++) {                                                                     \
        uint32_t pair;                                                                                          \
        memcpy(&pair, at[i / 3] + i % 3 * in, 4);                                                                      \
        VI both = (VI){0} + pair;                                                                               \
        V first = (V)(both << 16), second = (V)(both & 0xFFFF0000u);                                            \
        UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = sums[i][v] + low[v] * first + high[v] * second;   \
    }
#else
#define MULTIPLY(V, VI, PAIRS_ADD)                                                       \
    EACH(pair, 2) {                                                                      \
        V inputs[4];                                                                     \
        UNROLL for (int v = 0; v < vectors; v++)                                         \
            memcpy(&inputs[v], x + (k + pair) * gap + v * (i64)(sizeof(V) / 4), sizeof(V)); \
        UNROLL for (int i = 0; i < tall; i++)                                            \
            UNROLL for (int v = 0; v < vectors; v++) sums[i][v] += at[i / 3][i % 3 * in + pair] * inputs[v]; \
    }
#endif
#define TILE(name, V, VI, PAIRS_ADD)                                                                              \
    INLINE void F(name)(const W *w, i64 in, const A *x, i64 gap, float *out, i64 wide, int tall, int vectors) {   \
        V sums[12][4] = {{{0}}};                                                                                  \
        const W *at[4]; /* one pointer for three rows, hidden from the compiler, which else spills all offsets */ \
        UNROLL for (int j = 0; j < (tall + 2) / 3; j++) { at[j] = w + 3 * j * in; HIDE(at[j]); }                  \
        for (i64 line = 0; line < in; line += 64 / (i64)sizeof(W)) {                                              \
            i64 end = line + 64 / (i64)sizeof(W) < in ? line + 64 / (i64)sizeof(W) : in;                          \
            const W *next = w + tall * (in + line); /* the next tile, in the order of memory */                   \
            UNROLL for (int i = 0; i < tall; i++) __builtin_prefetch(next + i * 64 / (i64)sizeof(W), 0, 2);       \
            for (i64 k = line; k < end; k += 2) {                                                                 \
                MULTIPLY(V, VI, PAIRS_ADD)                                                                        \
                UNROLL for (int j = 0; j < (tall + 2) / 3; j++) at[j] += 2;                                       \
            }                                                                                                     \
        }                                                                                                         \
        UNROLL for (int i = 0; i < tall; i++)                                                                     \
            UNROLL for (int v = 0; v < vectors; v++)                                                              \
                memcpy(out + i * wide + v * (i64)(sizeof(V) / 4), &sums[i][v], sizeof(V));                        \
    }
TILE(tile, V, VI, pairs_add)
#if LANES == 16
TILE(tile_8, V8, VI8, pairs_add_8)
#endif

/* w (outputs, in), rounded to int8 -> panels, the last one padded with zeros, each followed by the scales of its
 * outputs. The largest weight of an output becomes 127 or -127, so that 0 stays 0. */
void F(pack_int8)(const T *w, int8_t *panels, i64 outputs, i64 in) {
    i64 bytes = PANEL * (in + (i64)sizeof(float));
    PARALLEL EACH(p, (outputs + PANEL - 1) / PANEL) {
        int8_t *to = panels + p * bytes;
        float scales[PANEL] = {0};
        memset(to, 0, (size_t)bytes);
        for (i64 o = 0; o < PANEL && p * PANEL + o < outputs; o++) {
            const T *row = w + (p * PANEL + o) * in;
            float top = 0.0f;
            SIMD_MAX(top) EACH(k, in) { float x = fabsf(GET(row[k])); top = x > top ? x : top; }
            scales[o] = top / 127.0f;
            if (scales[o] > 0.0f) EACH(k, in) to[k * PANEL + o] = (int8_t)nearbyintf(GET(row[k]) / scales[o]);
        }
        memcpy(to + PANEL * in, scales, sizeof(scales));
    }
}

/* out (count, wide) = w (count, in) x^T for inputs as store_inputs leaves them; wide = padded_rows(rows). `in` is even
 * unless the rows lie one after another. */
static void F(dots)(const W *w, i64 in, i64 count, const A *x, i64 wide, float *out) {
    if (wide <= FEW) {
        F(dots_along)(w, in, count, x, wide, out, wide, 1, WAITS(wide) ? AHEAD / (i64)sizeof(W) : 0);
        return;
    }
#if JOIN(PAIRS, SUFFIX)
    if (IS_ALONG(wide)) {
        F(dots_along_many)(w, in, count, x, wide, out);
        return;
    }
#endif
    /* the last tile begins early enough to be whole; what it computes again is equal */
#define TILES(name, tall, vectors, lanes)                                                                           \
    {                                                                                                               \
        i64 step = (tall) <= count ? (tall) : 1;                                                                    \
        for (i64 i = 0; i < count; i += step) {                                                                     \
            i64 at = i + step <= count ? i : count - step;                                                          \
            i64 shift = IN_STRIPS ? r * in : r * (JOIN(PAIRS, SUFFIX) ? 2 : 1), gap = IN_STRIPS ? (vectors) * (lanes) : wide; \
            if (step == 1) F(name)(w + at * in, in, x + shift, gap, out + at * wide + r, wide, 1, vectors);         \
            else F(name)(w + at * in, in, x + shift, gap, out + at * wide + r, wide, tall, vectors);                \
        }                                                                                                           \
        r += (vectors) * (lanes);                                                                                   \
    }
    i64 r = 0;
#if IN_STRIPS && !JOIN(HALF, SUFFIX)
    /* some strips stay in the cache while all of these weights are multiplied by them */
    for (i64 end; r + 16 <= wide; r = end) {
        end = least(wide / 16 * 16, r + 16 * (1 + STRIP_NUMBERS / (16 * in)));
        EACH_TILE(i, count) for (i64 at = r; at < end; at += 16)
            along(w + i * in, in, x + at * in, 16, out + i * wide + at, wide, in, tall, 0);
    }
#endif
#if LANES == 16
    while (r + 64 <= wide) TILES(tile, 6, 4, 16)
    if (r + 48 <= wide) TILES(tile, 8, 3, 16)
    if (r + 32 <= wide) TILES(tile, 12, 2, 16)
    if (r + 16 <= wide) TILES(tile, 12, 1, 16)
    if (r < wide) TILES(tile_8, 12, 1, 8)
#else
    while (r + 16 <= wide) TILES(tile, 6, 2, 8)
    if (r < wide) TILES(tile, 12, 1, 8)
#endif
#undef TILES
}
#undef MULTIPLY
#undef TILE
#endif
#endif
