/* CPU kernels of a decoder layer, between its matrix products.
 *
 * Every result row is computed by one thread in an order that depends on that row alone, so a row
 * is the same to the last bit whatever else is in the batch, however a prompt was cut into packs,
 * and whatever the number of threads.
 *
 * Built once per element type, see __init__.py: -DEEVP_BF16 for bfloat16 activations, else float32.
 * Sums are float32 throughout. Heads must be a multiple of 8 wide, other widths a multiple of 16.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* Floats in a register. GCC keeps a vector that fits into none in memory: on a processor with AVX2,
 * attention with vectors of 16 took twice as long. */
#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define PARTS (16 / LANES) /* registers that 16 floats take */

#define PAGE 16        /* tokens per page, see kv_cache.PAGE_SIZE */
#define CHUNK_PAGES 4 /* pages between two updates of the running softmax */
#define CHUNK (PAGE * CHUNK_PAGES)
#define MAX_QUERIES 4 /* query vectors that share one pass over a page */
#define MAX_HEAD 256

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2)));
typedef float vec8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t uvec8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t hvec8 __attribute__((vector_size(16), aligned(2)));

#ifdef EEVP_BF16
typedef uint16_t elem;

static inline vec load(const elem *p) {
#if LANES == 16 && defined(__AVX512F__) /* one instruction; GCC 12 makes four of the other form */
    return (vec)((uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)) << 16);
#else
    return (vec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16);
#endif
}
static inline vec8 load8(const elem *p) {
    return (vec8)(__builtin_convertvector(*(const hvec8 *)p, uvec8) << 16);
}
/* Round to nearest, ties to even. */
static inline void store(elem *p, vec x) {
    uvec u = (uvec)x;
    *(hvec *)p = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec);
}
static inline void store8(elem *p, vec8 x) {
    uvec8 u = (uvec8)x;
    *(hvec8 *)p = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec8);
}
static inline float load1(const elem *p) {
    union { uint32_t u; float f; } x = {(uint32_t)*p << 16};
    return x.f;
}
static inline void store1(elem *p, float f) {
    union { float f; uint32_t u; } x = {f};
    *p = (uint16_t)((x.u + 0x7fff + ((x.u >> 16) & 1)) >> 16);
}
#else
typedef float elem;

static inline vec load(const elem *p) { return *(const vec *)p; }
static inline vec8 load8(const elem *p) { return *(const vec8 *)p; }
static inline void store(elem *p, vec x) { *(vec *)p = x; }
static inline void store8(elem *p, vec8 x) { *(vec8 *)p = x; }
static inline float load1(const elem *p) { return *p; }
static inline void store1(elem *p, float f) { *p = f; }
#endif

static inline vec splat(float x) { return (vec){0} + x; }

/* The sum of 16 numbers, in one order at every width: sums over rows have 16 partial sums, however
 * many registers those take, and come out the same. */
static inline float sum_of(const vec *x) {
    float total = 0;
    for (int i = 0; i < 8; i++)
        total += x[i / LANES][i % LANES] + x[(i + 8) / LANES][(i + 8) % LANES];
    return total;
}

static inline float max_of(vec x) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#elif LANES == 8 && defined(__AVX__)
    __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#endif
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static inline vec pick(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* exp(x): 2^n * p(r), |r| <= ln 2 / 2, a degree 6 polynomial; 0 below -87.3, relative error about
 * 1e-7. NaN stays NaN. */
static inline vec exp_of(vec x) {
    ivec under = x < splat(-87.3f);
    x = pick(x > splat(88.0f), splat(88.0f), x);
    vec safe = pick(under, splat(0), x);
    vec scaled = safe * 1.44269504f;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    vec n = (scaled + magic) - magic;
    vec r = safe - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return pick(under, splat(0), p * (vec)power);
}

/* x [N, E] += delta [N, E] where there is one; out [N, E] = x / rms(x) * weight [E]. */
void eevp_norm(float *x, const elem *delta, const float *weight, float eps, elem *out,
               int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 8192)
    for (int64_t n = 0; n < rows; n++) {
        float *row = x + n * width;
        vec squares[PARTS] = {{0}};
        for (int64_t i = 0; i < width; i += 16)
            for (int p = 0; p < PARTS; p++) {
                float *at = row + i + p * LANES;
                vec v = *(vec *)at;
                if (delta) {
                    v += load(delta + n * width + i + p * LANES);
                    *(vec *)at = v;
                }
                squares[p] += v * v;
            }
        float scale = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(out + n * width + i, *(vec *)(row + i) * scale * *(const vec *)(weight + i));
    }
}

/* x += delta, `size` elements. */
void eevp_add(float *x, const elem *delta, int64_t size) {
#pragma omp parallel for if (size > 8192)
    for (int64_t i = 0; i < size; i += LANES) *(vec *)(x + i) += load(delta + i);
}

/* out [N, I] = silu(gate) * up, of gate_up [N, 2 I]. */
void eevp_silu_mul(const elem *gate_up, elem *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 8192)
    for (int64_t n = 0; n < rows; n++) {
        const elem *gate = gate_up + n * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            vec g = load(gate + i);
            store(out + n * width + i, g / (1.0f + exp_of(-g)) * load(up + i));
        }
    }
}

/* One head: norm (where the family has one), rotary embedding, factor. in [D] -> out [D]. */
static void turn_head(const elem *in, const float *norm, float eps, const float *cosine,
                      const float *sine, float factor, float *out, int64_t width) {
    float x[MAX_HEAD];
    for (int64_t i = 0; i < width; i += 8) *(vec8 *)(x + i) = load8(in + i);
    if (norm) {
        float squares = 0;
        for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
        float scale = 1.0f / sqrtf(squares / (float)width + eps);
        for (int64_t i = 0; i < width; i++) x[i] = x[i] * scale * norm[i];
    }
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = (x[i] * cosine[i] - x[i + half] * sine[i]) * factor;
        out[i + half] = (x[i + half] * cosine[i + half] + x[i] * sine[i + half]) * factor;
    }
}

/* What the attention of one layer needs; the same structure stands in attention.py. */
typedef struct {
    const elem *qkv;       /* [N, (H + 2 HK) D], not rotated */
    const float *cosine;   /* [N, D] */
    const float *sine;     /* [N, D] */
    const float *q_norm;   /* [D] or null */
    const float *k_norm;   /* [D] or null */
    const int64_t *slots;  /* [N] where each row's key and value go */
    const int64_t *positions; /* [N] */
    const int64_t *seats;     /* [N] row of the page table */
    const int64_t *page_table; /* [seats, P] */
    const int32_t *blocks; /* [num_blocks + 1] first row of each block; a block's rows are one
                              sequence's, at consecutive positions */
    elem *keys;            /* [pages, HK, D, PAGE] */
    elem *values;          /* [pages, HK, PAGE, D] */
    float *queries;        /* [N, H, D] scratch */
    elem *out;             /* [N, H, D] */
    int64_t num_rows, num_blocks, num_heads, num_kv_heads, head_size, table_width;
    int64_t window; /* positions that a row may look back, itself included; 0: all */
    float eps, scaling;
} Attention;

static void write_row(const Attention *a, int64_t n) {
    int64_t D = a->head_size, HK = a->num_kv_heads;
    const elem *q = a->qkv + n * (a->num_heads + 2 * HK) * D;
    const elem *k = q + a->num_heads * D, *v = k + HK * D;
    const float *cosine = a->cosine + n * D, *sine = a->sine + n * D;
    for (int64_t h = 0; h < a->num_heads; h++)
        turn_head(q + h * D, a->q_norm, a->eps, cosine, sine, a->scaling,
                  a->queries + (n * a->num_heads + h) * D, D);
    int64_t page = a->slots[n] / PAGE, offset = a->slots[n] % PAGE;
    float turned[MAX_HEAD];
    for (int64_t h = 0; h < HK; h++) {
        turn_head(k + h * D, a->k_norm, a->eps, cosine, sine, 1.0f, turned, D);
        elem *key = a->keys + (page * HK + h) * D * PAGE + offset;
        for (int64_t d = 0; d < D; d++) store1(key + d * PAGE, turned[d]);
        elem *value = a->values + ((page * HK + h) * PAGE + offset) * D;
        for (int64_t d = 0; d < D; d++) value[d] = v[h * D + d];
    }
}

/* Fetch two rows of a page, 2 * PAGE numbers, on their way to the second cache. This hint, unlike the
 * nearer ones, does not hold up loads: 26 GB/s against 16 of scattered pages, on Zen 4. */
static inline void fetch(const elem *p) {
    __builtin_prefetch(p, 0, 1);
    if (sizeof(elem) > 2) __builtin_prefetch(p + PAGE, 0, 1);
}

/* The query vectors of one key head that are taken together. */
typedef struct {
    const float *query[MAX_QUERIES];
    int64_t last[MAX_QUERIES], first[MAX_QUERIES]; /* positions that each may look at */
    elem *out[MAX_QUERIES];
} Queries;

/* Scores of one page, [R][PAGE]: lanes are the page's tokens, so no sum crosses lanes. Two partial
 * sums keep the multipliers busy. The page's values are fetched meanwhile. */
#define SCORE_PAGE(R)                                                                   \
    static inline void score_page_##R(const Queries *qs, const elem *key,               \
                                      const elem *value, int64_t D,                     \
                                      float (*scores)[CHUNK], int64_t at) {             \
        for (int64_t lane = 0; lane < PAGE; lane += LANES, key += LANES) {              \
            vec even[R], odd[R];                                                        \
            for (int r = 0; r < R; r++) even[r] = odd[r] = (vec){0};                    \
            for (int64_t d = 0; d < D; d += 2) {                                        \
                if (lane == 0) fetch(value + d * PAGE);                                 \
                vec k = load(key + d * PAGE), l = load(key + (d + 1) * PAGE);           \
                for (int r = 0; r < R; r++) {                                           \
                    even[r] += k * qs->query[r][d];                                     \
                    odd[r] += l * qs->query[r][d + 1];                                  \
                }                                                                       \
            }                                                                           \
            for (int r = 0; r < R; r++)                                                 \
                *(vec *)(scores[r] + at + lane) = even[r] + odd[r];                     \
        }                                                                               \
    }

/* acc [R][D] += weights [R][PAGE] values [PAGE, D]; 16 columns (or 8) at a time. Keys that come
 * later are fetched meanwhile: pages lie anywhere, and no hardware guesses the next one. */
#define ADD_VALUES(R)                                                                   \
    static inline void add_values_##R(float (*weights)[CHUNK], int64_t at,              \
                                      const elem *value, const elem *later, int64_t D,  \
                                      float (*acc)[MAX_HEAD]) {                         \
        int64_t c = 0;                                                                  \
        for (; c + 16 <= D; c += 16) {                                                  \
            vec sums[R][PARTS];                                                         \
            for (int r = 0; r < R; r++)                                                 \
                for (int p = 0; p < PARTS; p++)                                         \
                    sums[r][p] = *(vec *)(acc[r] + c + p * LANES);                      \
            for (int t = 0; t < PAGE; t++) {                                            \
                if (t % 2 == 0) fetch(later + (c + t) * PAGE);                          \
                for (int p = 0; p < PARTS; p++) {                                       \
                    vec v = load(value + t * D + c + p * LANES);                        \
                    for (int r = 0; r < R; r++) sums[r][p] += v * weights[r][at + t];   \
                }                                                                       \
            }                                                                           \
            for (int r = 0; r < R; r++)                                                 \
                for (int p = 0; p < PARTS; p++)                                         \
                    *(vec *)(acc[r] + c + p * LANES) = sums[r][p];                      \
        }                                                                               \
        for (; c < D; c += 8)                                                           \
            for (int r = 0; r < R; r++) {                                               \
                vec8 sum = *(vec8 *)(acc[r] + c);                                       \
                for (int t = 0; t < PAGE; t++)                                          \
                    sum += load8(value + t * D + c) * weights[r][at + t];               \
                *(vec8 *)(acc[r] + c) = sum;                                            \
            }                                                                           \
    }

SCORE_PAGE(1) SCORE_PAGE(2) SCORE_PAGE(3) SCORE_PAGE(4)
ADD_VALUES(1) ADD_VALUES(2) ADD_VALUES(3) ADD_VALUES(4)

static inline void score_page(int R, const Queries *qs, const elem *key, const elem *value,
                              int64_t D, float (*scores)[CHUNK], int64_t at) {
    if (R == 1) score_page_1(qs, key, value, D, scores, at);
    else if (R == 2) score_page_2(qs, key, value, D, scores, at);
    else if (R == 3) score_page_3(qs, key, value, D, scores, at);
    else score_page_4(qs, key, value, D, scores, at);
}

static inline void add_values(int R, float (*weights)[CHUNK], int64_t at, const elem *value,
                              const elem *later, int64_t D, float (*acc)[MAX_HEAD]) {
    if (R == 1) add_values_1(weights, at, value, later, D, acc);
    else if (R == 2) add_values_2(weights, at, value, later, D, acc);
    else if (R == 3) add_values_3(weights, at, value, later, D, acc);
    else add_values_4(weights, at, value, later, D, acc);
}

/* Turns a query's scores of positions start .. start + count - 1 into weights; the running maximum,
 * sum and accumulator follow (online softmax). What the query may not see weighs exactly 0, so a
 * page more or less, which batch mates bring, changes nothing. */
static void soften(float *scores, int64_t start, int64_t count, int64_t first, int64_t last,
                   float *best, float *total, float *acc, int64_t D) {
    vec tops = splat(-INFINITY);
    ivec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int64_t i = 0; i < count; i += LANES) {
        vec s = *(vec *)(scores + i);
        int64_t from = first - start - i, to = last - start - i;
        if (from > 0 || to < LANES - 1) {
            int32_t low = from < -1 ? -1 : from > LANES ? LANES : (int32_t)from;
            int32_t high = to < -1 ? -1 : to > LANES ? LANES : (int32_t)to;
            ivec seen = (lanes >= low) & (lanes <= high);
            s = pick(seen, s, splat(-INFINITY));
            *(vec *)(scores + i) = s;
        }
        tops = pick(s > tops, s, tops);
    }
    float top = max_of(tops);
    if (top < *best) top = *best;
    if (top == -INFINITY) { /* nothing to see yet */
        for (int64_t i = 0; i < count; i += LANES) *(vec *)(scores + i) = splat(0);
        return;
    }
    float shrink = *best == -INFINITY ? 0.0f : exp_of(splat(*best - top))[0];
    vec sums[PARTS] = {{0}};
    for (int64_t i = 0; i < count; i += 16)
        for (int p = 0; p < PARTS; p++) {
            vec *at = (vec *)(scores + i + p * LANES), weight = exp_of(*at - top);
            *at = weight;
            sums[p] += weight;
        }
    *total = *total * shrink + sum_of(sums);
    *best = top;
    for (int64_t d = 0; d < D; d += 8) *(vec8 *)(acc + d) *= shrink;
}

/* Whose pages are read: a sequence's, of one key head. */
typedef struct {
    const int64_t *pages;
    int64_t kv_head;
} Reading;

/* Keys that are read one chunk after page `index` of a reading that ends with page `last`; behind its
 * end come those of the next reading. */
static inline const elem *keys_after(const Attention *a, const Reading *now, const Reading *next,
                                     int64_t index, int64_t last) {
    int64_t later = index + CHUNK_PAGES;
    const Reading *whose = now;
    if (later > last) {
        whose = next;
        later = index % CHUNK_PAGES < a->table_width ? index % CHUNK_PAGES : 0;
    }
    return a->keys + (whose->pages[later] * a->num_kv_heads + whose->kv_head) * a->head_size * PAGE;
}

static void attend_queries(const Attention *a, int R, const Queries *qs, const Reading *now,
                           const Reading *next) {
    const int64_t *pages = now->pages, kv_head = now->kv_head;
    int64_t D = a->head_size, HK = a->num_kv_heads;
    float scores[MAX_QUERIES][CHUNK], acc[MAX_QUERIES][MAX_HEAD];
    float best[MAX_QUERIES], total[MAX_QUERIES];
    int64_t first = qs->first[0], last = qs->last[0];
    for (int r = 0; r < R; r++) {
        best[r] = -INFINITY;
        total[r] = 0;
        for (int64_t d = 0; d < D; d++) acc[r][d] = 0;
        if (qs->first[r] < first) first = qs->first[r];
        if (qs->last[r] > last) last = qs->last[r];
    }
    /* Chunks begin at multiples of CHUNK, whoever else is in the block. */
    for (int64_t start = first / CHUNK * CHUNK; start <= last; start += CHUNK) {
        int64_t low = first > start ? (first - start) / PAGE : 0;
        int64_t high = (last - start) / PAGE + 1; /* pages low .. high - 1 of this chunk */
        if (high > CHUNK_PAGES) high = CHUNK_PAGES;
        const int64_t *page = pages + start / PAGE;
        for (int64_t p = low; p < high; p++) {
            int64_t at = (page[p] * HK + kv_head) * D * PAGE;
            score_page(R, qs, a->keys + at, a->values + at, D, scores, p * PAGE);
        }
        for (int r = 0; r < R; r++)
            soften(scores[r] + low * PAGE, start + low * PAGE, (high - low) * PAGE, qs->first[r],
                   qs->last[r], best + r, total + r, acc[r], D);
        for (int64_t p = low; p < high; p++) {
            const elem *value = a->values + (page[p] * HK + kv_head) * D * PAGE;
            const elem *later = keys_after(a, now, next, start / PAGE + p, last / PAGE);
            add_values(R, scores, p * PAGE, value, later, D, acc);
        }
    }
    for (int r = 0; r < R; r++) {
        float scale = 1.0f / total[r];
        for (int64_t d = 0; d < D; d += 8) store8(qs->out[r] + d, *(vec8 *)(acc[r] + d) * scale);
    }
}

static Reading reading(const Attention *a, int64_t block, int64_t kv_head) {
    int64_t seat = a->seats[a->blocks[block]];
    return (Reading){a->page_table + seat * a->table_width, kv_head};
}

static void attend_block(const Attention *a, int64_t block, int64_t kv_head) {
    int64_t group = a->num_heads / a->num_kv_heads, begin = a->blocks[block];
    int64_t count = (a->blocks[block + 1] - begin) * group;
    Reading now = reading(a, block, kv_head);
    Reading next = kv_head + 1 < a->num_kv_heads ? reading(a, block, kv_head + 1)
                   : block + 1 < a->num_blocks   ? reading(a, block + 1, 0)
                                                 : now;
    Queries qs;
    int R = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = begin + i / group, head = kv_head * group + i % group;
        int64_t at = (row * a->num_heads + head) * a->head_size;
        qs.query[R] = a->queries + at;
        qs.out[R] = a->out + at;
        qs.last[R] = a->positions[row];
        qs.first[R] = a->window && qs.last[R] >= a->window ? qs.last[R] - a->window + 1 : 0;
        if (++R == MAX_QUERIES || i + 1 == count) {
            attend_queries(a, R, &qs, &now, &next);
            R = 0;
        }
    }
}

/* Write the rows' keys and values, then attend. With num_heads 0 the rows bring keys and values
 * only, and nothing attends. */
void eevp_attention(const Attention *a) {
#pragma omp parallel if (a->num_rows > 1)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < a->num_rows; n++) write_row(a, n);
#pragma omp for collapse(2) schedule(dynamic, 2)
        for (int64_t block = 0; block < a->num_blocks; block++)
            for (int64_t head = 0; head < a->num_kv_heads; head++) attend_block(a, block, head);
    }
}

/* --- scores over the vocabulary --------------------------------------------------------------- */

#define SELECT_BINS 1024
#define SCORE_BLOCK 32 /* columns per maximum, see score_summary.BLOCK */

static inline vec larger(vec x, vec y) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif LANES == 8 && defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)x, (__m256)y);
#endif
    return pick(x > y, x, y);
}

/* Of each row of scores [B, C]: the maximum of every block [B, ceil(C / 32)], log sum exp(x - m)
 * with m the row's maximum, and sum exp(x - m) (x - m) / sum exp(x - m). A row of 98 KB is read
 * twice, the second time out of the cache. NaN and infinities make both sums NaN. */
void eevp_summary(const elem *scores, int64_t rows, int64_t columns, int64_t stride, float *blocks,
                  float *log_sums, float *means) {
    int64_t num_blocks = (columns + SCORE_BLOCK - 1) / SCORE_BLOCK;
    int64_t whole = columns / SCORE_BLOCK * SCORE_BLOCK;
#pragma omp parallel for if (rows * columns > 65536)
    for (int64_t n = 0; n < rows; n++) {
        const elem *row = scores + n * stride;
        float *maxima = blocks + n * num_blocks, best = -INFINITY;
        for (int64_t i = 0; i < whole; i += SCORE_BLOCK) {
            vec most = load(row + i);
            for (int p = LANES; p < SCORE_BLOCK; p += LANES) most = larger(most, load(row + i + p));
            float found = max_of(most);
            maxima[i / SCORE_BLOCK] = found;
            best = found > best ? found : best;
        }
        if (whole < columns) {
            float found = -INFINITY;
            for (int64_t i = whole; i < columns; i++) {
                float x = load1(row + i);
                found = x > found ? x : found;
            }
            maxima[num_blocks - 1] = found;
            best = found > best ? found : best;
        }
        vec sum[2 * PARTS] = {{0}}, weighted[2 * PARTS] = {{0}};
        for (int64_t i = 0; i < whole; i += SCORE_BLOCK)
            for (int p = 0; p < 2 * PARTS; p++) {
                vec x = load(row + i + p * LANES) - best, e = exp_of(x);
                sum[p] += e;
                weighted[p] += e * x;
            }
        for (int p = 0; p < PARTS; p++) {
            sum[p] += sum[p + PARTS];
            weighted[p] += weighted[p + PARTS];
        }
        float total = sum_of(sum), product = sum_of(weighted);
        for (int64_t i = whole; i < columns; i++) {
            float x = load1(row + i) - best, e = expf(x);
            total += e;
            product += e * x;
        }
        log_sums[n] = logf(total);
        means[n] = product / total;
    }
}

/* Order of floats as integers: every value has its place, NaN too. */
static inline int32_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

/* The k-th largest (k from 1) of n keys, which are moved about: Hoare's quickselect. */
static int32_t quickselect(int32_t *a, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    k--;
    while (low < high) {
        int32_t x = a[low], y = a[low + (high - low) / 2], z = a[high];
        int32_t pivot = x < y ? (y < z ? y : x < z ? z : x) : (x < z ? x : y < z ? z : y);
        int64_t i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot) i++;
            while (a[j] < pivot) j--;
            if (i > j) break;
            int32_t swapped = a[i];
            a[i++] = a[j];
            a[j--] = swapped;
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return a[k];
}

/* The same, keys left alone: a histogram names the bin of the k-th, and only that is searched.
 * No branch of the two passes depends on a key. `bin` [n + 1] is scratch. */
static int32_t kth_largest(const int32_t *keys, int64_t n, int64_t k, int32_t *bin) {
    int32_t least = keys[0], most = keys[0], counts[SELECT_BINS] = {0};
    for (int64_t i = 1; i < n; i++) {
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    uint32_t base = (uint32_t)least, shift = 0, wanted = SELECT_BINS - 1;
    while (((uint32_t)most - base) >> shift >= SELECT_BINS) shift++;
    for (int64_t i = 0; i < n; i++) counts[((uint32_t)keys[i] - base) >> shift]++;
    for (; counts[wanted] < k; wanted--) k -= counts[wanted];
    int64_t size = 0;
    for (int64_t i = 0; i < n; i++) {
        bin[size] = keys[i];
        size += ((uint32_t)keys[i] - base) >> shift == wanted;
    }
    return quickselect(bin, size, k);
}

/* Columns of a row whose key is at least `least`, ascending, out of the blocks that have any. */
static int64_t collect(const elem *row, int64_t columns, const float *maxima, int32_t least,
                       int32_t *keys, int32_t *found) {
    int64_t count = 0;
    for (int64_t start = 0; start < columns; start += SCORE_BLOCK) {
        if (key_of(maxima[start / SCORE_BLOCK]) < least) continue;
        int64_t end = start + SCORE_BLOCK < columns ? start + SCORE_BLOCK : columns;
        for (int64_t i = start; i < end; i++) {
            int32_t key = key_of(load1(row + i));
            keys[count] = key;
            found[count] = (int32_t)i;
            count += key >= least;
        }
    }
    return count;
}

/* ids [B, K], ascending: the k largest of each row of scores [B, C], the first of equals at the
 * border; blocks as eevp_summary gives them. k < C. The k-th best block bounds the k-th score. */
void eevp_top_k(const elem *scores, int64_t rows, int64_t columns, int64_t stride,
                const float *blocks, int64_t k, int32_t *ids) {
    int64_t num_blocks = (columns + SCORE_BLOCK - 1) / SCORE_BLOCK;
#pragma omp parallel if (rows > 1)
    {
        int32_t *keys = malloc((3 * columns + 3) * sizeof *keys);
        int32_t *moved = keys + columns + 1, *found = moved + columns + 1;
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < rows; n++) {
            const float *maxima = blocks + n * num_blocks;
            const elem *row = scores + n * stride;
            int32_t *out = ids + n * k, least = INT32_MIN;
            if (k <= num_blocks) {
                for (int64_t i = 0; i < num_blocks; i++) keys[i] = key_of(maxima[i]);
                least = kth_largest(keys, num_blocks, k, moved);
            }
            int64_t count = collect(row, columns, maxima, least, keys, found);
            if (count < k) /* a NaN hid a block's best */
                count = collect(row, columns, maxima, INT32_MIN, keys, found);
            int32_t border = kth_largest(keys, count, k, moved);
            int64_t equal = k, kept = 0;
            for (int64_t i = 0; i < count; i++) equal -= keys[i] > border;
            for (int64_t i = 0; i < count; i++) {
                int32_t key = keys[i];
                moved[kept] = found[i];
                kept += (key > border) | ((key == border) & (equal > 0));
                equal -= key == border;
            }
            memcpy(out, moved, k * sizeof *out);
        }
        free(keys);
    }
}

/* out [B, K] = states [B, E] . weight [V, E] at ids [B, K]; no row of the weight is copied. */
void eevp_gathered(const elem *states, const elem *weight, const int32_t *ids, elem *out,
                   int64_t rows, int64_t k, int64_t width) {
#pragma omp parallel for collapse(2) if (rows * k * width > 65536)
    for (int64_t n = 0; n < rows; n++)
        for (int64_t j = 0; j < k; j++) {
            const elem *state = states + n * width, *w = weight + (int64_t)ids[n * k + j] * width;
            vec sum[2 * PARTS] = {{0}};
            int64_t i = 0;
            for (; i + 32 <= width; i += 32)
                for (int p = 0; p < 2 * PARTS; p++)
                    sum[p] += load(state + i + p * LANES) * load(w + i + p * LANES);
            for (int p = 0; i < width; p++, i += LANES) sum[p] += load(state + i) * load(w + i);
            for (int p = 0; p < PARTS; p++) sum[p] += sum[p + PARTS];
            store1(out + n * k + j, sum_of(sum));
        }
}
