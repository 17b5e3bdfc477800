/* One forward of a transformer decoder on N nodes: the operations of a program, run in order.
 *
 * Weights are float32, bfloat16 or int8 with a scale a row, where they are or, of small models, laid
 * out in panels; arithmetic is float32. Every sum is taken in an order that depends on nothing but
 * what is summed: not on the number of nodes, nor on the slot that a key sits in. So a token tree, a
 * chain and single tokens give the same numbers, bit for bit.
 *
 * Batch-1 decoding is bound by reading the weights, hence the two rules here: a weight is read once
 * for all nodes, and the next ones are fetched while these are multiplied.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef __unix__
#include <sched.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

enum { LANES = 8 };  /* the same on every machine, so that sums are the same, too */
#define VECTOR(n) __attribute__((vector_size(n)))
typedef float vf VECTOR(LANES * 4);
typedef int32_t vi VECTOR(LANES * 4);
/* anywhere in memory, whatever lies there */
typedef vf any_vf __attribute__((aligned(1), may_alias));
typedef vi any_vi __attribute__((aligned(1), may_alias));

enum { FLOAT32, BFLOAT16, INT8 };
enum { NONE, SILU, GELU_TANH, GELU, RELU };
enum { EMBED, NORM, LINEAR, ROTATE, ATTEND, TAP, SPREAD };

struct Pieces;

/* One operation; see program.py, which mirrors this layout field by field. */
typedef struct {
  int32_t kind, dtype, activation, layer;
  int32_t source, target, add, wait;  /* buffers; add to the target; threads meet afterwards */
  int64_t in_width, out_width;        /* K and O of a LINEAR; widths of rows elsewhere */
  int64_t stride, offset;             /* of LINEAR's O values in a row of the target */
  const void *weight, *gate;          /* gate: target = activation(gate x) * (weight x); EMBED: the
                                         table of positions, whose first row is at offset */
  const float *scale, *gate_scale;    /* [O] of int8 weights */
  const void *bias;                   /* [O] of a LINEAR, [D] of a NORM */
  int64_t bias_dtype;
  float eps, factor;                  /* factor: of scores (ATTEND), of rows (EMBED, LINEAR) */
  int64_t window;                     /* keys seen, counted from the query; 0 is all */
  int32_t mean, store;                /* NORM: subtract the mean; ATTEND: which store */
  int32_t whole, biased;              /* ATTEND: all that is stored and no node, ROTATE: nodes are all
                                         that is stored; ATTEND: add SPREAD's table */
  const void *panels, *gate_panels;   /* of a LINEAR whose weights were laid out for it, or null:
                                         [O / PANEL, K, PANEL], the last panel filled with zeros */
} Op;

/* Keys and values of all layers. */
typedef struct {
  float *keys, *values;               /* [L, B, H_kv, capacity, D] */
  int64_t capacity, layer_stride;     /* in slots; in elements */
  int64_t used;                       /* slots in use in every row */
  const int32_t *live;                /* [B, used] slots that are seen, in order, or null: all */
  const int64_t *lengths;             /* [B] how many they are */
} Store;

/* One call: B rows of N nodes on top of what is cached. */
typedef struct {
  int64_t batch, nodes;
  const int64_t *tokens, *positions;  /* [B, N] */
  const uint8_t *ancestors;           /* [1 or B, N, N], or null for a chain */
  int64_t ancestor_stride;            /* 0 when all rows are alike */
  Store stores[2];                    /* what came before the nodes; the encoder's output */
  int64_t heads, kv_heads, head_dim, rotary_dim;
  int64_t threads;
  const float *cosines, *sines;       /* [positions, rotary_dim] */
  const int32_t *buckets;             /* [span] of key minus query, the first one -reach */
  int64_t span, reach;
  float *buffers[8];                  /* [B * N, width] each */
  float *taps;                        /* [taps, B * N, D], in the order of TAP's layer field */
  const int32_t *tapped;              /* place of each TAP in taps, or -1 */
  float *scratch;                     /* [threads, scratch_size] */
  int64_t scratch_size;
  struct Pieces *pieces;              /* [operations], zero */
  float *dealt;                       /* [B * N + 1, widest]: what many nodes are multiplied from */
} Call;

#define UNROLL _Pragma("GCC unroll 8")

static inline vf load(const float *p) { return *(const any_vf *)p; }
static inline void store(float *p, vf v) { *(any_vf *)p = v; }
static inline vf splat(float x) { vf v; for (int i = 0; i < LANES; i++) v[i] = x; return v; }

/* a * b + c, rounded once wherever it stands: left to the compiler it would be at some places only */
static inline vf fma_(vf a, vf b, vf c) {
#if defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

typedef float v4 VECTOR(16);

/* Lanes i and i + 4 added up. */
static inline v4 fold(vf v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

static inline float sum(vf v) {
  v4 h = fold(v);
  return (h[0] + h[2]) + (h[1] + h[3]);
}

/* The sums of four vectors, each in the order of sum(). */
static inline v4 sums(vf a, vf b, vf c, vf d) {
  v4 h = fold(a), i = fold(b), j = fold(c), k = fold(d);
  v4 p = __builtin_shufflevector(h, i, 0, 4, 1, 5), q = __builtin_shufflevector(j, k, 0, 4, 1, 5);
  v4 r = __builtin_shufflevector(h, i, 2, 6, 3, 7), s = __builtin_shufflevector(j, k, 2, 6, 3, 7);
  v4 first = __builtin_shufflevector(p, q, 0, 1, 4, 5), second = __builtin_shufflevector(p, q, 2, 3, 6, 7);
  v4 third = __builtin_shufflevector(r, s, 0, 1, 4, 5), fourth = __builtin_shufflevector(r, s, 2, 3, 6, 7);
  return (first + third) + (second + fourth);
}

static inline float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f;
}
static inline float read_as(const void *p, int64_t i, int dtype) {
  return dtype == FLOAT32 ? ((const float *)p)[i] : from_bf16(((const uint16_t *)p)[i]);
}

/* e^x within two units of the last place; x is clamped to where the result is normal. Adding magic,
 * 1.5 * 2^23, rounds to an integer. */
#define EXPONENTIAL(NAME, F, I)                                                                  \
  static inline F NAME(F x) {                                                                    \
    const F low = (F){0} + -87.3f, high = (F){0} + 88.3f;                                        \
    I below = x < low, above = x > high;                                                         \
    x = (F)(((I)low & below) | ((I)high & above) | ((I)x & ~(below | above)));                   \
    F n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;                                         \
    F r = x - n * 0.693359375f + n * 2.12194440e-4f;                                             \
    F p = (F){0} + 1.9875691500e-4f;                                                             \
    p = p * r + 1.3981999507e-3f;                                                                \
    p = p * r + 8.3334519073e-3f;                                                                \
    p = p * r + 4.1665795894e-2f;                                                                \
    p = p * r + 1.6666665459e-1f;                                                                \
    p = p * r + 5.0000001201e-1f;                                                                \
    p = p * r * r + r + 1.0f;                                                                    \
    I power = (__builtin_convertvector(n, I) + 127) << 23;                                       \
    return p * (F)power;                                                                         \
  }

EXPONENTIAL(expv, vf, vi)

#define ACTIVATION(NAME, F, I, EXP)                                                              \
  static inline F NAME(F x, int kind) {                                                          \
    if (kind == SILU) return x / (1.0f + EXP(-x));                                               \
    if (kind == GELU_TANH) {                                                                     \
      F y = 0.7978845608f * (x + 0.044715f * x * x * x);                                         \
      return x / (1.0f + EXP(-2.0f * y)); /* (1 + tanh y) / 2 = 1 / (1 + e^-2y) */               \
    }                                                                                            \
    if (kind == GELU) {                                                                          \
      const I sign = (I){0} + INT32_MIN; /* erf by Abramowitz and Stegun 7.1.26: 1.5e-7 off at most */ \
      F z = (F)((I)x & ~sign) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);                 \
      F p = (F){0} + 1.061405429f;                                                               \
      p = p * t - 1.453152027f;                                                                  \
      p = p * t + 1.421413741f;                                                                  \
      p = p * t - 0.284496736f;                                                                  \
      p = p * t + 0.254829592f;                                                                  \
      F erf = 1.0f - p * t * EXP(-z * z);                                                        \
      return 0.5f * x * (1.0f + (F)((I)erf | ((I)x & sign)));                                    \
    }                                                                                            \
    if (kind == RELU) return (F)((I)x & (I)(x > 0.0f));                                          \
    return x;                                                                                    \
  }

ACTIVATION(activate, vf, vi, expv)

/* ---- products -------------------------------------------------------------------------------
 *
 * A 32-bit lane holds one float32, two bfloat16 or four int8 weights, and comes apart with a shift
 * and no shuffle: first the lowest part of every lane, then the next. So x is dealt out beforehand
 * into the same order: part p of a block of LANES * P values holds those at p, p + P, p + 2P ...
 */

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define WIDE 1
#endif
enum { FETCH = 16384, TILE = 64, CHUNK = 96, STRIPE = 512, GROUP = 8, FEW = 4, SOME = 32 };
enum { COLUMNS = 5, WIDE_STRIPE = 768 };
static const int64_t PARTS[] = {1, 2, 4};
static const int64_t SIZES[] = {4, 2, 1};

static inline vf part_f32(vi w, int p) { (void)p; return (vf)w; }
static inline vf part_bf16(vi w, int p) { return (vf)(p ? w & (int32_t)0xffff0000 : w << 16); }
static inline vf part_i8(vi w, int p) { return __builtin_convertvector(w << (24 - 8 * p) >> 24, vf); }

#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)

/* One row of x, its vectors `step` apart. */
static void deal(const float *x, int64_t K, int dtype, float *out, int64_t step) {
  if (dtype == FLOAT32) {
    for (int64_t k = 0; k < K; k += LANES, out += step) store(out, load(x + k));
    return;
  }
  for (int64_t k = 0; k < K; k += LANES * PARTS[dtype], x += LANES * PARTS[dtype]) {
    vf a = load(x), b = load(x + LANES), e = EVEN(a, b), o = ODD(a, b);
    if (dtype == INT8) {
      vf c = load(x + 2 * LANES), d = load(x + 3 * LANES), f = EVEN(c, d), p = ODD(c, d);
      store(out, EVEN(e, f));
      store(out + step, EVEN(o, p));
      store(out + 2 * step, ODD(e, f));
      store(out + 3 * step, ODD(o, p));
    } else {
      store(out, e);
      store(out + step, o);
    }
    out += step * PARTS[dtype];
  }
}

/* y [C, R] = x [C, K] times R rows of weights, values from .. to of each; the rows that come `ahead`
 * are fetched meanwhile. Unfinished sums wait in `open`. */
#define BLOCK(NAME, PART, P, R, C)                                                               \
  static inline void NAME##_##R##x##C(const float *x, int64_t K, const char *w, float *y,        \
                                      int64_t ys, int64_t ahead, int64_t from, int64_t to,       \
                                      float *open) {                                             \
    const int64_t row = K * 4 / P;                                                               \
    vf a[R][C];                                                                                  \
    UNROLL for (int r = 0; r < R; r++)                                                           \
      UNROLL for (int c = 0; c < C; c++)                                                         \
        a[r][c] = from ? load(open + (r * C + c) * LANES) : splat(0.0f);                         \
    for (int64_t k = from * 4 / P; k < to * 4 / P; k += LANES * 4) {                             \
      vi packed[R];                                                                              \
      UNROLL for (int r = 0; r < R; r++) packed[r] = *(const any_vi *)(w + r * row + k);         \
      if (ahead)                                                                                 \
        UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(w + r * row + k + ahead);          \
      UNROLL for (int p = 0; p < P; p++) {                                                       \
        vf part[R];                                                                              \
        UNROLL for (int r = 0; r < R; r++) part[r] = PART(packed[r], p);                         \
        UNROLL for (int c = 0; c < C; c++) {                                                     \
          vf xv = load(x + c * K + k / 4 * P + p * LANES);                                       \
          UNROLL for (int r = 0; r < R; r++) a[r][c] = fma_(part[r], xv, a[r][c]);               \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
    if (to < K) {                                                                                \
      UNROLL for (int r = 0; r < R; r++)                                                         \
        UNROLL for (int c = 0; c < C; c++) store(open + (r * C + c) * LANES, a[r][c]);           \
    } else if (R * C % 4 == 0) {                                                                 \
      UNROLL for (int i = 0; i < R * C; i += 4) {                                                \
        v4 h = sums(a[i % R][i / R], a[(i + 1) % R][(i + 1) / R], a[(i + 2) % R][(i + 2) / R],   \
                    a[(i + 3) % R][(i + 3) / R]);                                                \
        UNROLL for (int j = 0; j < 4; j++) y[(i + j) / R * ys + (i + j) % R] = h[j];             \
      }                                                                                          \
    } else {                                                                                     \
      UNROLL for (int c = 0; c < C; c++)                                                         \
        UNROLL for (int r = 0; r < R; r++) y[c * ys + r] = sum(a[r][c]);                         \
    }                                                                                            \
  }

#define PAIRS(NAME, C, R)                                                                        \
  for (; r + R <= end; r += R) {                                                                 \
    const char *rows_here = w + r * row;                                                         \
    float *sums_here = y + n * ys + r, *open_here = open + (r - g) * C * LANES;                  \
    if (N <= FEW || (N <= SOME && (r - g) / R % tiles == tile))                                  \
      NAME##_##R##x##C(x + n * K, K, rows_here, sums_here, ys, (N <= FEW ? R : GROUP) * row,     \
                       from, to, open_here);                                                     \
    else                                                                                         \
      NAME##_##R##x##C(x + n * K, K, rows_here, sums_here, ys, 0, from, to, open_here);          \
  }                                                                                              \
  for (; r < end; r++)                                                                           \
    NAME##_1x##C(x + n * K, K, w + r * row, y + n * ys + r, ys, 0, from, to,                     \
                 open + (r - g) * C * LANES);

/* Few columns: the weights pass by, row after row. Some: a group of rows stays in the first-level
 * cache until all columns have met it, and the next group is fetched meanwhile. Many: as much of
 * the columns stays there, against all rows. */
#define PRODUCT(NAME, PART, P)                                                                   \
  BLOCK(NAME, PART, P, 2, 6) BLOCK(NAME, PART, P, 1, 6)                                          \
  BLOCK(NAME, PART, P, 2, 4) BLOCK(NAME, PART, P, 1, 4)                                          \
  BLOCK(NAME, PART, P, 4, 2) BLOCK(NAME, PART, P, 1, 2)                                          \
  BLOCK(NAME, PART, P, 4, 1) BLOCK(NAME, PART, P, 1, 1)                                          \
  static void NAME(const float *x, int64_t K, int64_t N, const char *w, int64_t rows,            \
                   float *y, int64_t ys) {                                                       \
    const int64_t row = K * 4 / P, tiles = (N + 5) / 6;                                          \
    const int64_t group = N > FEW && N <= SOME ? GROUP : rows, part = N <= SOME ? K : STRIPE;    \
    float open[CHUNK * 6 * LANES];                                                               \
    for (int64_t g = 0; g < rows; g += group) {                                                  \
      int64_t end = g + group < rows ? g + group : rows;                                         \
      for (int64_t n = 0, c, tile = 0; n < N; n += c, tile++) {                                  \
        int64_t left = N - n;                                                                    \
        c = left >= 6 && left != 8 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;                      \
        for (int64_t from = 0, to; from < K; from = to) {                                        \
          to = from + part < K ? from + part : K;                                                \
          int64_t r = g;                                                                         \
          if (c == 6) { PAIRS(NAME, 6, 2) }                                                      \
          if (c == 4) { PAIRS(NAME, 4, 2) }                                                      \
          if (c == 2) { PAIRS(NAME, 2, 4) }                                                      \
          if (c == 1) { PAIRS(NAME, 1, 4) }                                                      \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
  }

PRODUCT(product_f32, part_f32, 1)
PRODUCT(product_bf16, part_bf16, 2)
PRODUCT(product_i8, part_i8, 4)


#ifdef WIDE
/* Registers of two vectors: the sums of two nodes go on side by side, each as it would alone. x lies
 * in pairs of nodes, vector by vector; a row of weights is read into both halves. */
typedef float wf VECTOR(64);
typedef int32_t wi VECTOR(64);

static inline wi both(const char *w) {
  return (wi)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)w));
}
static inline wf load_wide(const float *p) { return (wf)_mm512_loadu_ps(p); }
static inline void store_wide(float *p, wf v) { _mm512_storeu_ps(p, (__m512)v); }
static inline wf fma_wide(wf a, wf b, wf c) {
  return (wf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static inline wf wide_f32(wi w, int p) { (void)p; return (wf)w; }
static inline wf wide_bf16(wi w, int p) { return (wf)(p ? w & (int32_t)0xffff0000 : w << 16); }
static inline wf wide_i8(wi w, int p) { return __builtin_convertvector(w << (24 - 8 * p) >> 24, wf); }

/* Sums of four rows of two pairs of nodes, each in the order of sum(): nodes in 128-bit lanes. */
static inline wf sums_wide(const wf *one, const wf *two) {
  __m512 h[4];
  UNROLL for (int r = 0; r < 4; r++)
    h[r] = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)one[r], (__m512)two[r], 0x88),
                         _mm512_shuffle_f32x4((__m512)one[r], (__m512)two[r], 0xdd));
  __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(h[0], h[1]), _mm512_unpackhi_ps(h[0], h[1]));
  __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(h[2], h[3]), _mm512_unpackhi_ps(h[2], h[3]));
  return (wf)_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}

static inline void put(float *y, int64_t ys, int64_t R, int64_t nodes, __m512 four) {
  v4 part[4];
  memcpy(part, &four, sizeof part);
  for (int64_t n = 0; n < nodes; n++) memcpy(y + n * ys, part + n, R * sizeof(float));
}

/* y [nodes, 4 or fewer] = C pairs of nodes times R rows; see BLOCK. */
#define WIDE_BLOCK(NAME, PART, P, R, C)                                                          \
  static inline void NAME##_wide_##R##x##C(const float *x, int64_t K, const char *w, float *y,   \
                                           int64_t ys, int64_t nodes, const char *next,          \
                                           int64_t fetched,                                      \
                                           int64_t from, int64_t to, float *open) {              \
    const int64_t row = K * 4 / P;                                                               \
    wf a[C + 1][4];                                                                              \
    UNROLL for (int c = 0; c < C; c++)                                                           \
      UNROLL for (int r = 0; r < R; r++)                                                         \
        a[c][r] = from ? load_wide(open + (c * R + r) * 2 * LANES) : (wf)_mm512_setzero_ps();    \
    for (int64_t k = from * 4 / P; k < to * 4 / P; k += LANES * 4) {                             \
      wi packed[R];                                                                              \
      UNROLL for (int r = 0; r < R; r++) packed[r] = both(w + r * row + k);                      \
      for (int64_t i = 0; i < fetched; i++) __builtin_prefetch(next + i * row + k);              \
      UNROLL for (int p = 0; p < P; p++) {                                                       \
        wf part[R];                                                                              \
        UNROLL for (int r = 0; r < R; r++) part[r] = PART(packed[r], p);                         \
        UNROLL for (int c = 0; c < C; c++) {                                                     \
          wf xv = load_wide(x + 2 * (c * K + k / 4 * P + p * LANES));                            \
          UNROLL for (int r = 0; r < R; r++) a[c][r] = fma_wide(part[r], xv, a[c][r]);           \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
    if (to < K) {                                                                                \
      UNROLL for (int c = 0; c < C; c++)                                                         \
        UNROLL for (int r = 0; r < R; r++)                                                       \
          store_wide(open + (c * R + r) * 2 * LANES, a[c][r]);                                   \
      return;                                                                                    \
    }                                                                                            \
    UNROLL for (int c = 0; c < C; c++)                                                           \
      UNROLL for (int r = R; r < 4; r++) a[c][r] = a[c][0];                                      \
    UNROLL for (int r = 0; r < 4; r++) a[C][r] = a[C - 1][r];                                    \
    UNROLL for (int c = 0; c < C; c += 2) {                                                      \
      wf four = sums_wide(a[c], a[c + 1]);                                                       \
      int64_t left = nodes - 2 * c, most = C - c > 1 ? 4 : 2;                                    \
      put(y + 2 * c * ys, ys, R, left < most ? left : most, (__m512)four);                       \
    }                                                                                            \
  }

/* Blocks of some nodes share the rows that they fetch: one each of a group, if there are as many. */
#define WIDE_ROWS(NAME, C)                                                                       \
  case C:                                                                                        \
    for (; r + 4 <= end; r += 4) {                                                               \
      int64_t fetched = N <= FEW ? 4 : N <= SOME ? (4 + tiles - 1) / tiles : 0;                  \
      const char *next = w + (N <= FEW ? r + 4 : end + (t * 2 + (r - g) / 4) * fetched) * row;   \
      NAME##_wide_4x##C(x + 2 * n * K, K, w + r * row, y + 2 * n * ys + r, ys, N - 2 * n, next,  \
                        fetched, from, to, open + (r - g) * C * 2 * LANES);                      \
    }                                                                                            \
    for (; r < end; r++)                                                                         \
      NAME##_wide_1x##C(x + 2 * n * K, K, w + r * row, y + 2 * n * ys + r, ys, N - 2 * n, w, 0,  \
                        from, to, open + (r - g) * C * 2 * LANES);                               \
    break;

#define WIDE_PRODUCT(NAME, PART, P)                                                              \
  WIDE_BLOCK(NAME, PART, P, 4, 5) WIDE_BLOCK(NAME, PART, P, 1, 5)                                \
  WIDE_BLOCK(NAME, PART, P, 4, 4) WIDE_BLOCK(NAME, PART, P, 1, 4)                                \
  WIDE_BLOCK(NAME, PART, P, 4, 3) WIDE_BLOCK(NAME, PART, P, 1, 3)                                \
  WIDE_BLOCK(NAME, PART, P, 4, 2) WIDE_BLOCK(NAME, PART, P, 1, 2)                                \
  WIDE_BLOCK(NAME, PART, P, 4, 1) WIDE_BLOCK(NAME, PART, P, 1, 1)                                \
  static void NAME##_wide(const float *x, int64_t K, int64_t N, const char *w, int64_t rows,     \
                          float *y, int64_t ys) {                                                \
    const int64_t row = K * 4 / P, pairs = (N + 1) / 2, tiles = (pairs + COLUMNS - 1) / COLUMNS; \
    const int64_t group = N > FEW && N <= SOME ? GROUP : rows;                                   \
    const int64_t stripes = N <= SOME ? 1 : (K + WIDE_STRIPE - 1) / WIDE_STRIPE;                 \
    const int64_t part = (K / stripes + LANES * P - 1) / (LANES * P) * (LANES * P);              \
    float open[CHUNK * COLUMNS * 2 * LANES];                                                     \
    for (int64_t g = 0; g < rows; g += group) {                                                  \
      int64_t end = g + group < rows ? g + group : rows;                                         \
      for (int64_t n = 0, c, t = 0; n < pairs; n += c, t++) {                                    \
        c = (pairs - n + tiles - t - 1) / (tiles - t);                                           \
        for (int64_t from = 0, to; from < K; from = to) {                                        \
          to = from + part < K ? from + part : K;                                                \
          int64_t r = g;                                                                         \
          switch (c) {                                                                           \
            WIDE_ROWS(NAME, 1) WIDE_ROWS(NAME, 2) WIDE_ROWS(NAME, 3) WIDE_ROWS(NAME, 4)          \
            WIDE_ROWS(NAME, 5)                                                                   \
          }                                                                                      \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
  }

EXPONENTIAL(expv_wide, wf, wi)
ACTIVATION(activate_wide, wf, wi, expv_wide)

WIDE_PRODUCT(product_f32, wide_f32, 1)
WIDE_PRODUCT(product_bf16, wide_bf16, 2)
WIDE_PRODUCT(product_i8, wide_i8, 4)
#endif

/* ---- panels ---------------------------------------------------------------------------------
 *
 * Weights that were laid out beforehand: PANEL outputs lie side by side, value by value of K. A
 * register holds the sums of as many outputs as it has lanes, each taken value after value, so that
 * nothing depends on how wide registers are, and nothing has to be added up across lanes. DEEP values
 * of a panel stay in the first-level cache until a band of nodes has met them; the panel that comes
 * next is fetched meanwhile.
 */
enum { PANEL = 64, DEEP = 256, BAND = 96, ROUND = 6 };

#ifdef WIDE
typedef wf pf;
#define PANEL_LOAD load_wide
#define PANEL_STORE store_wide
#define PANEL_FMA fma_wide
#define PANEL_ACTIVATE activate_wide
static inline pf panel_splat(float x) { return (wf)_mm512_set1_ps(x); }
static inline pf panel_bf16(const uint16_t *w) {
  return (wf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16);
}
static inline pf panel_i8(const int8_t *w) {
  return (wf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}
enum { SIDE = 4 };
#else
typedef vf pf;
#define PANEL_LOAD load
#define PANEL_STORE store
#define PANEL_FMA fma_
#define PANEL_ACTIVATE activate
static inline pf panel_splat(float x) { return splat(x); }
static inline pf panel_bf16(const uint16_t *w) {
  vf v; for (int i = 0; i < LANES; i++) v[i] = from_bf16(w[i]); return v;
}
static inline pf panel_i8(const int8_t *w) {
  vf v; for (int i = 0; i < LANES; i++) v[i] = w[i]; return v;
}
enum { SIDE = 2 };
#endif
static inline pf panel_f32(const float *w) { return PANEL_LOAD(w); }
enum { STRIP = SIDE * sizeof(pf) / sizeof(float) };  /* outputs whose sums fit the registers */

/* y [R, STRIP] = x [R, count] times as many values of a strip of a panel, added to y where it is
 * open; a line of what `next` points to is fetched with each of them, where step is not 0. */
#define PANEL_BLOCK(NAME, TYPE, R)                                                               \
  static inline void NAME##_##R(const float *x, int64_t xs, const TYPE *w, int64_t count,        \
                                float *y, int open, const char *next, int64_t step) {            \
    enum { W = sizeof(pf) / sizeof(float) };                                                     \
    pf a[R][SIDE];                                                                               \
    UNROLL for (int r = 0; r < R; r++)                                                           \
      UNROLL for (int v = 0; v < SIDE; v++)                                                      \
        a[r][v] = open ? PANEL_LOAD(y + r * PANEL + v * W) : panel_splat(0.0f);                  \
    for (int64_t k = 0; k < count; k++, w += PANEL, next += step) {                              \
      pf part[SIDE];                                                                             \
      UNROLL for (int v = 0; v < SIDE; v++) part[v] = NAME(w + v * W);                           \
      if (step) __builtin_prefetch(next, 0, 2);                                                  \
      UNROLL for (int r = 0; r < R; r++) {                                                       \
        pf value = panel_splat(x[r * xs + k]);                                                   \
        UNROLL for (int v = 0; v < SIDE; v++) a[r][v] = PANEL_FMA(value, part[v], a[r][v]);      \
      }                                                                                          \
    }                                                                                            \
    UNROLL for (int r = 0; r < R; r++)                                                           \
      UNROLL for (int v = 0; v < SIDE; v++) PANEL_STORE(y + r * PANEL + v * W, a[r][v]);         \
  }

#define PANEL_CASE(NAME, R) case R: NAME##_##R(xn, K, ws, count, yn, from > 0, now, step); break;

/* y [N, PANEL] = x [N, K] times one panel, N up to BAND; `next` is the panel to fetch, or null. */
#define PANEL_PRODUCT(NAME, TYPE)                                                                \
  PANEL_BLOCK(NAME, TYPE, 1) PANEL_BLOCK(NAME, TYPE, 2) PANEL_BLOCK(NAME, TYPE, 3)               \
  PANEL_BLOCK(NAME, TYPE, 4) PANEL_BLOCK(NAME, TYPE, 5) PANEL_BLOCK(NAME, TYPE, 6)               \
  static void NAME##_product(const float *x, int64_t K, int64_t N, const TYPE *w, float *y,      \
                             const char *next) {                                                 \
    int64_t tiles = (N + ROUND - 1) / ROUND, lines = next ? K * (int64_t)sizeof(TYPE) : 0;       \
    for (int64_t from = 0, count; from < K; from += count) {                                     \
      count = K - from < DEEP ? K - from : DEEP;                                                 \
      for (int64_t n = 0, c, t = 0; n < N; n += c, t++) {                                        \
        c = (N - n + tiles - t - 1) / (tiles - t);                                               \
        for (int64_t s = 0; s < PANEL; s += STRIP) {                                             \
          const float *xn = x + n * K + from;                                                    \
          const TYPE *ws = w + from * PANEL + s;                                                 \
          float *yn = y + n * PANEL + s;                                                         \
          const char *now = next;                                                                \
          int64_t step = lines > 0 ? 64 : 0;                                                     \
          switch (c) {                                                                           \
            PANEL_CASE(NAME, 1) PANEL_CASE(NAME, 2) PANEL_CASE(NAME, 3)                          \
            PANEL_CASE(NAME, 4) PANEL_CASE(NAME, 5) PANEL_CASE(NAME, 6)                          \
          }                                                                                      \
          next += count * step;                                                                  \
          lines -= count;                                                                        \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
  }

PANEL_PRODUCT(panel_f32, float)
PANEL_PRODUCT(panel_bf16, uint16_t)
PANEL_PRODUCT(panel_i8, int8_t)

static void multiply_panel(const float *x, int64_t K, int64_t N, const void *panels, int64_t p,
                           int dtype, float *y, const char *next) {
  const char *w = (const char *)panels + p * PANEL * K * SIZES[dtype];
  if (dtype == FLOAT32) panel_f32_product(x, K, N, (const float *)w, y, next);
  if (dtype == BFLOAT16) panel_bf16_product(x, K, N, (const uint16_t *)w, y, next);
  if (dtype == INT8) panel_i8_product(x, K, N, (const int8_t *)w, y, next);
}

/* x [N, K] as products want it, at out or where it is; `paired` for registers of two nodes. */
static const float *dealt_out(const float *x, int64_t K, int64_t N, int dtype, int paired,
                              float *out) {
  if (!paired && dtype == FLOAT32) return x;
  for (int64_t n = 0; n < N; n++) {
    if (!paired) deal(x + n * K, K, dtype, out + n * K, LANES);
    else deal(x + n * K, K, dtype, out + n / 2 * 2 * K + n % 2 * LANES, 2 * LANES);
  }
  if (paired && N % 2)  /* the last one has only itself beside it */
    deal(x + (N - 1) * K, K, dtype, out + (N - 1) * K + LANES, 2 * LANES);
  return out;
}

#ifdef WIDE
static int paired_for(int64_t N) { return N > 1; }
#else
static int paired_for(int64_t N) { return N < 0; }
#endif

/* y [N, rows] (stride ys) = x [N, K], dealt out already, times rows of a weight matrix. */
static void multiply(const float *x, int64_t K, int64_t N, int paired, const void *weight,
                     int dtype, const float *scale, int64_t first, int64_t rows, float *y,
                     int64_t ys) {
  const char *w = (const char *)weight + first * K * SIZES[dtype];
#ifdef WIDE
  if (paired) {
    if (dtype == FLOAT32) product_f32_wide(x, K, N, w, rows, y, ys);
    if (dtype == BFLOAT16) product_bf16_wide(x, K, N, w, rows, y, ys);
    if (dtype == INT8) product_i8_wide(x, K, N, w, rows, y, ys);
  } else
#endif
  {
    if (dtype == FLOAT32) product_f32(x, K, N, w, rows, y, ys);
    if (dtype == BFLOAT16) product_bf16(x, K, N, w, rows, y, ys);
    if (dtype == INT8) product_i8(x, K, N, w, rows, y, ys);
  }
  if (scale)
    for (int64_t n = 0; n < N; n++)
      for (int64_t r = 0; r < rows; r++) y[n * ys + r] *= scale[first + r];
}

/* ---- operations ---------------------------------------------------------------------------- */

/* Pieces of one operation: how many have been handed out and how many are finished. Threads take
 * pieces and wait for pieces, never for each other: one that the system has put aside holds up
 * nobody unless it has a piece in its hands. */
typedef struct Pieces { int32_t taken, done, dealing, dealt, apart[12]; } Pieces;

static inline int64_t take(Pieces *pieces) {
  return __atomic_fetch_add(&pieces->taken, 1, __ATOMIC_RELAXED);
}
static inline void finish(Pieces *pieces, int64_t count) {
  __atomic_fetch_add(&pieces->done, count, __ATOMIC_RELEASE);
}

/* Rows of a product for one thread: fewer and fewer, so that all threads end together. */
static inline int64_t take_rows(Pieces *pieces, int64_t O, int64_t least, int64_t most,
                                int64_t threads, int64_t *first) {
  int32_t start = __atomic_load_n(&pieces->taken, __ATOMIC_RELAXED);
  int64_t rows;
  do {
    rows = (O - start) / (2 * threads) / 16 * 16;
    rows = rows > most ? most : rows < least && least < most ? least : rows < 16 ? 16 : rows;
    rows = O - start < rows ? O - start : rows;
    if (rows <= 0) return 0;
  } while (!__atomic_compare_exchange_n(&pieces->taken, &start, (int32_t)(start + rows), 1,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  *first = start;
  return rows;
}
static inline void wait_for(const int32_t *done, int64_t count) {
  for (int64_t tries = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < count; tries++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#ifdef __unix__
    if (tries > 4000) sched_yield();  /* the holder may want this very core */
#endif
  }
}

static int64_t embed(const Op *op, const Call *call, Pieces *pieces) {
  int64_t rows = call->batch * call->nodes, D = op->out_width;
  for (int64_t n; (n = take(pieces)) < rows; finish(pieces, 1)) {
    float *out = call->buffers[op->target] + n * D;
    int64_t at = call->tokens[n] * D, place = (call->positions[n] + op->offset) * D;
    for (int64_t d = 0; d < D; d++) out[d] = op->factor * read_as(op->weight, at + d, op->dtype);
    if (op->gate)
      for (int64_t d = 0; d < D; d++) out[d] += read_as(op->gate, place + d, op->dtype);
  }
  return rows;
}

/* What relative positions add to the scores of each head, by key minus query: [H, span]. */
static int64_t spread(const Op *op, const Call *call, Pieces *pieces) {
  for (int64_t h; (h = take(pieces)) < call->heads; finish(pieces, 1))
    for (int64_t i = 0; i < call->span; i++)
      call->buffers[op->target][h * call->span + i] =
          read_as(op->weight, call->buckets[i] * call->heads + h, op->dtype);
  return call->heads;
}

static void normalize(const float *x, float *y, int64_t D, const Op *op, const void *weight) {
  float mean = 0.0f;
  if (op->mean) {
    vf total = splat(0.0f);
    for (int64_t d = 0; d < D; d += LANES) total += load(x + d);
    mean = sum(total) / D;
  }
  vf squares = splat(0.0f);
  for (int64_t d = 0; d < D; d += LANES) {
    vf v = load(x + d) - mean;
    squares += v * v;
  }
  float inverse = 1.0f / sqrtf(sum(squares) / D + op->eps);
  if (op->dtype == FLOAT32)
    for (int64_t d = 0; d < D; d += LANES)
      store(y + d, (load(x + d) - mean) * inverse * load((const float *)weight + d));
  else
    for (int64_t d = 0; d < D; d++) y[d] = (x[d] - mean) * inverse * read_as(weight, d, op->dtype);
  if (op->bias && op->bias_dtype == FLOAT32)
    for (int64_t d = 0; d < D; d += LANES)
      store(y + d, load(y + d) + load((const float *)op->bias + d));
  else if (op->bias)
    for (int64_t d = 0; d < D; d++) y[d] += read_as(op->bias, d, op->bias_dtype);
}

static int64_t norm(const Op *op, const Call *call, Pieces *pieces) {
  int64_t rows = call->batch * call->nodes, D = op->in_width;
  for (int64_t n; (n = take(pieces)) < rows; finish(pieces, 1))
    normalize(call->buffers[op->source] + n * D, call->buffers[op->target] + n * D, D, op,
              op->weight);
  return rows;
}

/* Deal out many nodes, each thread some of them. Products of one source that nobody waits between
 * share what the first of them dealt. */
static const float *deal_together(const Op *op, const Call *call, Pieces *pieces) {
  int64_t N = call->batch * call->nodes, K = op->in_width, tiles = (N + TILE - 1) / TILE;
  for (; pieces > call->pieces && op[-1].kind == LINEAR && !op[-1].wait &&
         op[-1].source == op->source; op--) pieces--;
  for (int64_t t; (t = __atomic_fetch_add(&pieces->dealing, 1, __ATOMIC_RELAXED)) < tiles;
       __atomic_fetch_add(&pieces->dealt, 1, __ATOMIC_RELEASE)) {
    int64_t n = t * TILE, count = N - n < TILE ? N - n : TILE;
    const float *x = call->buffers[op->source] + n * K;
    float *out = call->dealt + n * K;
    if (dealt_out(x, K, count, op->dtype, paired_for(N), out) != out)
      memcpy(out, x, count * K * sizeof(float));
  }
  wait_for(&pieces->dealt, tiles);
  return call->dealt;
}

/* What is done with products [N, rows] (stride size) before they are values of the target. */
static void complete(const Op *op, int64_t N, int64_t first, int64_t rows, int64_t size,
                     float *out, const float *more, float *y) {
  for (int64_t n = 0; n < N; n++) {
    float *from = out + n * size, *to = y + n * op->stride + first;
    const float *gate = more + n * size;
    if (op->factor)
      for (int64_t r = 0; r < rows; r++) from[r] *= op->factor;
    if (op->bias)
      for (int64_t r = 0; r < rows; r++) from[r] += read_as(op->bias, first + r, op->bias_dtype);
    if (op->gate)  /* whole vectors: a row of the scratch has room for them */
      for (int64_t r = 0; r < rows; r += LANES)
        store(from + r, load(from + r) * activate(load(gate + r), op->activation));
    else if (op->activation)
      for (int64_t r = 0; r < rows; r += LANES)
        store(from + r, activate(load(from + r), op->activation));
    if (op->add)
      for (int64_t r = 0; r < rows; r++) to[r] += from[r];
    else
      memcpy(to, from, rows * sizeof(float));
  }
}

/* The same for N nodes of one panel, whose row of the target has room for `rows` of them. */
static inline void complete_as(const Op *op, int64_t N, int64_t rows, const float *out,
                               const float *more, const float *bias, const float *scales,
                               float *y, int gated, int kind, int add) {
  for (int64_t n = 0; n < N; n++, out += PANEL, more += PANEL, y += op->stride) {
    float rest[PANEL], *to = rows == PANEL ? y : rest;
    if (to != y && add) memcpy(rest, y, rows * sizeof(float));
    for (int r = 0; r < PANEL; r += (int)(sizeof(pf) / sizeof(float))) {
      pf v = PANEL_LOAD(out + r);
      if (op->scale) v *= PANEL_LOAD(scales + r);
      if (op->factor) v *= op->factor;
      if (op->bias) v += PANEL_LOAD(bias + r);
      if (gated) {
        pf gate = PANEL_LOAD(more + r);
        if (op->scale) gate *= PANEL_LOAD(scales + PANEL + r);
        v *= PANEL_ACTIVATE(gate, kind);
      } else if (kind) v = PANEL_ACTIVATE(v, kind);
      PANEL_STORE(to + r, add ? PANEL_LOAD(to + r) + v : v);
    }
    if (to != y) memcpy(y, rest, rows * sizeof(float));
  }
}

static void complete_panel(const Op *op, int64_t N, int64_t first, int64_t rows, const float *out,
                           const float *more, float *y) {
  float bias[PANEL] = {0}, scales[2 * PANEL] = {0};
  for (int64_t r = 0; op->bias && r < rows; r++)
    bias[r] = read_as(op->bias, first + r, op->bias_dtype);
  if (op->scale) memcpy(scales, op->scale + first, rows * sizeof(float));
  if (op->gate_scale) memcpy(scales + PANEL, op->gate_scale + first, rows * sizeof(float));
  y += first;
  if (op->gate) complete_as(op, N, rows, out, more, bias, scales, y, 1, op->activation, op->add);
  else if (op->activation == RELU && !op->add) complete_as(op, N, rows, out, more, bias, scales, y, 0, RELU, 0);
  else if (op->activation) complete_as(op, N, rows, out, more, bias, scales, y, 0, op->activation, op->add);
  else if (op->add) complete_as(op, N, rows, out, more, bias, scales, y, 0, NONE, 1);
  else complete_as(op, N, rows, out, more, bias, scales, y, 0, NONE, 0);
}

/* The same with weights that were laid out in panels: many nodes band by band, each against a group
 * of panels, so that what is read and written lies close together. */
static int64_t linear_panels(const Op *op, const Call *call, Pieces *pieces, float *scratch,
                             const Op *after) {
  int64_t N = call->batch * call->nodes, K = op->in_width, O = op->out_width;
  int64_t panels = (O + PANEL - 1) / PANEL, together = N > BAND ? 4 : 1;
  if (panels < call->threads * together) together = 1;
  int64_t groups = (panels + together - 1) / together;
  float *y = call->buffers[op->target] + op->offset, *out = scratch, *more = out + BAND * PANEL;
  for (int64_t g; (g = take(pieces)) < groups; finish(pieces, 1))
    for (int64_t n = 0; n < N; n += BAND) {
      int64_t count = N - n < BAND ? N - n : BAND, last = (g + 1) * together;
      const float *x = call->buffers[op->source] + n * K;
      for (int64_t p = g * together; p < panels && p < last; p++) {
        int64_t first = p * PANEL, rows = O - first < PANEL ? O - first : PANEL;
        int64_t ahead = p + (together > 1 ? 1 : call->threads);  /* what this thread takes next */
        const char *next = ahead < panels
            ? (const char *)op->panels + ahead * PANEL * K * SIZES[op->dtype] : after->panels;
        multiply_panel(x, K, count, op->panels, p, op->dtype, out, N > FEW && !n ? next : 0);
        if (op->gate) multiply_panel(x, K, count, op->gate_panels, p, op->dtype, more, 0);
        complete_panel(op, count, first, rows, out, more, y + n * op->stride);
      }
    }
  return groups;
}

static int64_t linear(const Op *op, const Call *call, Pieces *pieces, float *scratch,
                      const Op *after) {
  if (op->panels) return linear_panels(op, call, pieces, scratch, after);
  int64_t N = call->batch * call->nodes, K = op->in_width, O = op->out_width;
  int64_t size = 262144 / (K * SIZES[op->dtype]) / 16 * 16;  /* what stays in a cache */
  size = size < 16 ? 16 : size > CHUNK ? CHUNK : size;
  float *y = call->buffers[op->target] + op->offset;
  float *out = scratch, *more = out + TILE * size;
  int paired = paired_for(N);
  const float *x = N > TILE ? deal_together(op, call, pieces)
                            : dealt_out(call->buffers[op->source], K, N, op->dtype, paired,
                                        more + TILE * size);
  int64_t least = N <= FEW ? 16 : 48;
  for (int64_t first, rows; (rows = take_rows(pieces, O, least, size, call->threads, &first)) > 0;
       finish(pieces, rows))
    for (int64_t n = 0; n < N; n += TILE) {
      int64_t count = N - n < TILE ? N - n : TILE;
      multiply(x + n * K, K, count, paired, op->weight, op->dtype, op->scale, first, rows, out, size);
      if (op->gate)
        multiply(x + n * K, K, count, paired, op->gate, op->dtype, op->gate_scale, first, rows, more,
                 size);
      complete(op, count, first, rows, size, out, more, y + n * op->stride);
    }
  return O;
}

/* Rotate queries and keys to their positions and write keys and values into the store. The source
 * buffer holds [queries | keys | values] of each node; queries stay in it. */
static int64_t rotate(const Op *op, const Call *call, Pieces *pieces) {
  int64_t H = call->heads, G = call->kv_heads, D = call->head_dim, R = call->rotary_dim;
  int64_t width = (H + 2 * G) * D, rows = call->batch * call->nodes;
  const Store *kept = call->stores;
  for (int64_t n; (n = take(pieces)) < rows; finish(pieces, 1)) {
    float *row = call->buffers[op->source] + n * width;
    const float *c = R ? call->cosines + call->positions[n] * R : 0;
    const float *s = R ? call->sines + call->positions[n] * R : 0;
    for (int64_t h = 0; h < H + G; h++) {
      float *v = row + h * D;
      const void *weight = h < H ? op->weight : op->gate;
      if (weight) normalize(v, v, D, op, weight);
      for (int64_t d = 0; d < R / 2; d++) {
        float a = v[d], b = v[d + R / 2];
        v[d] = a * c[d] - b * s[d];
        v[d + R / 2] = b * c[d + R / 2] + a * s[d + R / 2];
      }
    }
    int64_t b = n / call->nodes, slot = (op->whole ? 0 : kept->used) + n % call->nodes;
    for (int64_t g = 0; g < G; g++) {
      int64_t at = op->layer * kept->layer_stride + ((b * G + g) * kept->capacity + slot) * D;
      memcpy(kept->keys + at, row + (H + g) * D, D * sizeof(float));
      memcpy(kept->values + at, row + (H + G + g) * D, D * sizeof(float));
    }
  }
  return rows;
}

enum { QUERIES = 8, SLOTS = 64, SPREADS = 5 };

/* Weights of the values that one query sees, in place: softmax over count scores. */
static void soften(float *scores, int64_t count, float factor) {
  float top = -INFINITY;
  int64_t t = 0;
  if (count >= LANES) {
    vf most = load(scores);
    for (t = LANES; t + LANES <= count; t += LANES) {
      vf v = load(scores + t);
      vi larger = v > most;
      most = (vf)(((vi)v & larger) | ((vi)most & ~larger));
    }
    for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
  }
  for (; t < count; t++) top = scores[t] > top ? scores[t] : top;
  vf total = splat(0.0f);
  t = 0;
#ifdef WIDE
  for (; t + 2 * LANES <= count; t += 2 * LANES) {
    wf e = expv_wide((load_wide(scores + t) - top) * factor);
    store_wide(scores + t, e);
    total += (vf)_mm512_castps512_ps256((__m512)e);
    total += (vf)_mm512_extractf32x8_ps((__m512)e, 1);
  }
#endif
  for (; t + LANES <= count; t += LANES) {
    vf e = expv((load(scores + t) - top) * factor);
    store(scores + t, e);
    total += e;
  }
  if (t < count) {
    float rest[LANES];
    for (int i = 0; i < LANES; i++) rest[i] = t + i < count ? (scores[t + i] - top) * factor : -INFINITY;
    vf e = expv(load(rest));
    for (int i = 0; i < LANES; i++) if (t + i >= count) e[i] = 0.0f;
    store(rest, e);
    memcpy(scores + t, rest, (count - t) * sizeof(float));
    total += e;
  }
  float inverse = 1.0f / sum(total);
  for (t = 0; t < count; t++) scores[t] *= inverse;
}

/* Slots that lie one after the other, from the t-th that is seen up to the limit-th. */
static inline int64_t run_of(const int32_t *live, int64_t t, int64_t limit) {
  if (!live) return limit - t;
  int64_t end = t + 1;
  while (end < limit && live[end] == live[end - 1] + 1) end++;
  return end - t;
}

/* Weighted values of count slots, vectors d .. d + V, added to what is in out. A value of out is
 * summed slot after slot, however many are summed side by side. */
#define GATHER(NAME, TYPE, LOAD, STORE, FMA, WIDTH, Q, V)                                        \
  static inline void NAME##_##Q##x##V(const float *p, int64_t ps, float *const *out,             \
                                      const float *values, int64_t count, int64_t D, int64_t d) {\
    TYPE a[Q][V];                                                                                \
    UNROLL for (int i = 0; i < Q; i++)                                                           \
      UNROLL for (int v = 0; v < V; v++) a[i][v] = LOAD(out[i] + d + v * WIDTH);                 \
    for (int64_t t = 0; t < count; t++) {                                                        \
      TYPE value[V];                                                                             \
      UNROLL for (int v = 0; v < V; v++) value[v] = LOAD(values + t * D + d + v * WIDTH);        \
      UNROLL for (int i = 0; i < Q; i++) {                                                       \
        TYPE weight = (TYPE){0} + p[i * ps + t];                                                 \
        UNROLL for (int v = 0; v < V; v++) a[i][v] = FMA(weight, value[v], a[i][v]);             \
      }                                                                                          \
    }                                                                                            \
    UNROLL for (int i = 0; i < Q; i++)                                                           \
      UNROLL for (int v = 0; v < V; v++) STORE(out[i] + d + v * WIDTH, a[i][v]);                 \
  }

GATHER(gather, vf, load, store, fma_, LANES, 4, 2)
GATHER(gather, vf, load, store, fma_, LANES, 1, 8)
GATHER(gather, vf, load, store, fma_, LANES, 1, 1)
#ifdef WIDE
GATHER(gather_wide, wf, load_wide, store_wide, fma_wide, 2 * LANES, 8, 2)
GATHER(gather_wide, wf, load_wide, store_wide, fma_wide, 2 * LANES, 4, 4)
GATHER(gather_wide, wf, load_wide, store_wide, fma_wide, 2 * LANES, 2, 4)
GATHER(gather_wide, wf, load_wide, store_wide, fma_wide, 2 * LANES, 1, 4)
#endif

/* The same for any number of queries and all vectors. */
static void gather_all(const float *p, int64_t ps, float *const *out, int64_t Q,
                       const float *values, int64_t count, int64_t D) {
  int64_t all = 0; /* vectors that are done for every query */
#ifdef WIDE
#define GO(Q_, V_)                                                               \
  for (; i + Q_ <= Q; i += Q_)                                                   \
    for (int64_t d = 0; d + V_ * 2 * LANES <= wide; d += V_ * 2 * LANES)         \
      gather_wide_##Q_##x##V_(p + i * ps, ps, out + i, values, count, D, d);
  int64_t i = 0, wide = D / (8 * LANES) * (8 * LANES);
  GO(8, 2) GO(4, 4) GO(2, 4) GO(1, 4)
#undef GO
  all = wide;
#endif
  for (int64_t i = 0, q; i < Q; i += q) {
    int64_t d = all;
    q = Q - i >= 4 ? 4 : 1;
    const float *pi = p + i * ps;
    if (q == 4)
      for (; d + 2 * LANES <= D; d += 2 * LANES)
        gather_4x2(pi, ps, out + i, values, count, D, d);
    else
      for (; d + 8 * LANES <= D; d += 8 * LANES)
        gather_1x8(pi, ps, out + i, values, count, D, d);
    for (; d < D; d += LANES)
      for (int64_t j = 0; j < q; j++)
        gather_1x1(pi + j * ps, ps, out + i + j, values, count, D, d);
  }
}

/* Attention of a block of queries that share a key head: nodes x query heads of the group. A query
 * sees what is stored for its row, then its ancestors, in the order of their positions. */
static void attend_block(const Op *op, const Call *call, int64_t b, int64_t g, int64_t first,
                         int64_t count, float *scratch) {
  int64_t H = call->heads, G = call->kv_heads, D = call->head_dim, N = call->nodes;
  const Store *kept = call->stores + op->store;
  int64_t group = H / G, width = (H + 2 * G) * D, past = kept->lengths[b];
  int64_t base = op->layer * kept->layer_stride + (b * G + g) * kept->capacity * D;
  const float *keys = kept->keys + base, *values = kept->values + base;
  int64_t tail = kept->used * D;
  const int32_t *live = kept->live ? kept->live + b * kept->used : 0;
  const uint8_t *seen = call->ancestors ? call->ancestors + b * call->ancestor_stride : 0;
  const int64_t *places = call->positions + b * N;
  /* slots that are taken in order by the whole block: what is stored and, on a chain, what lies
   * before its first query */
  int64_t shared = past + (seen || live || op->whole ? 0 : first / group + 1), lowest = shared;
  int64_t stride = (past + N + 2 * LANES) / LANES * LANES;
  float *p = scratch, *q = p + count * stride, *tile = q + count * D;
  float *own = tile + (count + 1) * D, *out[QUERIES];
  int64_t node[QUERIES] = {0}, low[QUERIES], total[QUERIES];
  for (int64_t i = 0; i < count; i++) {
    int64_t n = (first + i) / group, h = g * group + (first + i) % group;
    node[i] = n;
    memcpy(q + i * D, call->buffers[op->source] + (b * N + n) * width + h * D, D * sizeof(float));
    out[i] = call->buffers[op->target] + ((b * N + n) * H + h) * D;
    int64_t from = op->window ? places[n] - op->window + 1 : 0;
    low[i] = from < 0 ? 0 : from > shared ? shared : from;
    lowest = low[i] < lowest ? low[i] : lowest;
    total[i] = shared;
  }
  int64_t last = op->whole ? -1 : node[count - 1];
#define SEES(i, j)                                                              \
  ((j) <= node[i] && (!seen || seen[node[i] * N + (j)]) &&                      \
   (!op->window || places[node[i]] - places[j] < op->window))
  const float *x = dealt_out(q, D, count, FLOAT32, paired_for(count), tile);
  for (int64_t t = lowest, run; t < shared; t += run) {
    run = run_of(live, t, shared);
    multiply(x, D, count, paired_for(count), keys + (live ? live[t] : t) * D, FLOAT32, 0, 0, run, p + t,
             stride);
  }
  int64_t j = shared - past, more = last + 1 - j;
  if (more > 0) {
    multiply(x, D, count, paired_for(count), keys + tail + j * D, FLOAT32, 0, 0, more, own, more);
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = j; k <= last; k++)
        if (SEES(i, k)) p[i * stride + total[i]++] = own[i * more + k - j];
  }
  for (int64_t i = 0; op->biased && i < count; i++) {
    int64_t head = g * group + (first + i) % group, u = shared;
    const float *by = call->buffers[SPREADS] + head * call->span + call->reach - places[node[i]];
    float *pi = p + i * stride;
    for (int64_t t = low[i]; t < shared; t++)
      pi[t] = pi[t] * op->factor + by[op->whole && live ? live[t] : t];
    for (int64_t k = j; u < total[i]; k++)
      if (SEES(i, k)) {
        pi[u] = pi[u] * op->factor + by[places[k]];
        u++;
      }
  }
  for (int64_t i = 0; i < count; i++) {
    float *pi = p + i * stride;
    soften(pi + low[i], total[i] - low[i], op->biased ? 1.0f : op->factor);
    for (int64_t t = lowest; t < low[i]; t++) pi[t] = 0.0f;
    memset(out[i], 0, D * sizeof(float));
  }
  for (int64_t t = lowest, run; t < shared; t += run) {  /* a tile of values stays close */
    run = run_of(live, t, shared < t + SLOTS ? shared : t + SLOTS);
    gather_all(p + t, stride, out, count, values + (live ? live[t] : t) * D, run, D);
  }
  for (int64_t i = 0; i < count; i++) {
    int64_t t = shared;
    for (int64_t k = j; k <= node[i] && !op->whole; k++) {
      if (!SEES(i, k)) continue;
      vf weight = splat(p[i * stride + t++]);
      for (int64_t d = 0; d < D; d += LANES)
        store(out[i] + d, fma_(weight, load(values + tail + k * D + d), load(out[i] + d)));
    }
  }
#undef SEES
}

static int64_t attend(const Op *op, const Call *call, Pieces *pieces, float *scratch) {
  int64_t all = call->nodes * (call->heads / call->kv_heads);
  int64_t blocks = (all + QUERIES - 1) / QUERIES, rows = call->batch * call->kv_heads;
  for (int64_t task; (task = take(pieces)) < rows * blocks; finish(pieces, 1)) {
    int64_t row = task / blocks, first = task % blocks * QUERIES;
    int64_t count = all - first < QUERIES ? all - first : QUERIES;
    int64_t b = row / call->kv_heads, g = row % call->kv_heads;
    attend_block(op, call, b, g, first, count, scratch);
  }
  return rows * blocks;
}

static int64_t tap(const Op *op, const Call *call, Pieces *pieces) {
  int64_t rows = call->batch * call->nodes, D = op->in_width;
  if (!call->taps || call->tapped[op->layer] < 0) return 0;
  if (!take(pieces)) {
    memcpy(call->taps + call->tapped[op->layer] * rows * D, call->buffers[op->source],
           rows * D * sizeof(float));
    finish(pieces, 1);
  }
  return 1;
}

static void fetch(const Op *op) {
  const char *weight = op->panels ? (const char *)op->panels : op->weight;
  const char *gate = op->gate_panels ? (const char *)op->gate_panels : op->gate;
  for (int64_t i = 0; i < FETCH; i += 64) {
    __builtin_prefetch(weight + i, 0, 2);
    if (gate) __builtin_prefetch(gate + i, 0, 2);
  }
}

/* The product that comes next; after the last one the first, as in the next forward. */
static const Op *product_after(const Op *ops, int64_t count, int64_t i) {
  for (int64_t j = (i + 1) % count; j != i; j = (j + 1) % count)
    if (ops[j].kind == LINEAR) return ops + j;
  return ops + i;
}

static void run(const Op *ops, int64_t count, const Call *call, int thread) {
  float *scratch = call->scratch + thread * call->scratch_size;
  int64_t open = 0, expected[8];  /* operations since the last wait */
  for (int64_t i = 0; i < count; i++) {
    const Op *op = ops + i;
    Pieces *pieces = call->pieces + i;
    int64_t all = 0;
    switch (op->kind) {
      case EMBED: all = embed(op, call, pieces); break;
      case NORM: all = norm(op, call, pieces); break;
      case LINEAR:
        all = linear(op, call, pieces, scratch, product_after(ops, count, i));
        break;
      case ROTATE: all = rotate(op, call, pieces); break;
      case ATTEND: all = attend(op, call, pieces, scratch); break;
      case TAP: all = tap(op, call, pieces); break;
      case SPREAD: all = spread(op, call, pieces); break;
    }
    expected[open++] = all;
    if (op->wait)  /* whoever is early fetches what comes next */
      for (int64_t j = i + 1; j < count && j < i + 3; j++)
        if (ops[j].kind == LINEAR) {
          fetch(ops + j);
          break;
        }
    if (!op->wait && open < 8 && i + 1 < count) continue;
    for (int64_t j = 0; j < open; j++) wait_for(&pieces[-j].done, expected[open - 1 - j]);
    open = 0;
  }
}

void isthmus_forward(const Op *ops, int64_t count, const Call *call) {
#ifdef _OPENMP
#pragma omp parallel num_threads(call->threads)
  run(ops, count, call, omp_get_thread_num());
#else
  run(ops, count, call, 0);
#endif
}

/* ---- the likeliest output -------------------------------------------------------------------
 *
 * Which output of a product is the largest takes few of its sums. Products of int8 say what each
 * is to within a bound that holds for certain, and only outputs whose upper bound reaches the
 * largest lower one are summed in float32, value after value as panels are, so that the answer is
 * the first of the largest of all sums.
 *
 * Of an output, w = s q + e, and of a node, x = t u + g, with q and u whole numbers. By the
 * inequality of Cauchy and Schwarz, w x is s t (q u) give or take |e| |t u| + |w| |g|. What float32
 * rounds, in the sum and here, is in the norms that the caller and code() hand on.
 */
enum { WIDTH = 16 };

typedef struct {
  const int8_t *weights;              /* q [O / PANEL, K / 4, PANEL, 4] */
  const int32_t *starts;              /* [O]: codes are u + 128, this takes 128 times the sum of q off */
  const float *steps, *errors, *norms, *slack, *bias;  /* [O] s, |e|, |w|, what is left, bias */
  uint8_t *codes;                     /* [N, K] */
  float *nodes;                       /* [3, N] t, |t u|, |g| */
  float *lows;                        /* [threads, N, WIDTH] the largest lower bounds */
  float *upper, *peaks;               /* [N, O]; [N, O / PANEL, WIDTH], the largest of each panel */
} Screen;

#if defined(WIDE) && defined(__AVX512VNNI__)
/* u of one node; where a sum might leave the range of float32, t is no number and all bounds are off. */
static void code(const float *x, int64_t K, uint8_t *codes, float *nodes, int64_t N) {
  __m256 most = _mm256_setzero_ps(), limit = _mm256_set1_ps(127.0f);
  for (int64_t k = 0; k < K; k += LANES)
    most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + k)), most);
  float top = _mm512_reduce_max_ps(_mm512_insertf32x8(_mm512_setzero_ps(), most, 0));
  float t = top > 1e-30f ? top / 127.0f : 0.0f, inverse = t > 0.0f ? 1.0f / t : 0.0f;
  __m512d whole = _mm512_setzero_pd(), rest = whole;
  for (int64_t k = 0; k < K; k += LANES) {
    __m256 v = _mm256_loadu_ps(x + k);
    __m256 u = _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(inverse)), _MM_FROUND_TO_NEAREST_INT);
    u = _mm256_max_ps(_mm256_min_ps(u, limit), _mm256_sub_ps(_mm256_setzero_ps(), limit));
    __m256i shifted = _mm256_add_epi32(_mm256_cvtps_epi32(u), _mm256_set1_epi32(128));
    _mm_storel_epi64((__m128i *)(codes + k), _mm256_cvtepi32_epi8(shifted));
    __m512d y = _mm512_mul_pd(_mm512_set1_pd(t), _mm512_cvtps_pd(u));
    __m512d g = _mm512_sub_pd(_mm512_cvtps_pd(v), y);
    whole = _mm512_fmadd_pd(y, y, whole);
    rest = _mm512_fmadd_pd(g, g, rest);
  }
  double size = sqrt(_mm512_reduce_add_pd(whole)) * 1.000001;
  double off = sqrt(_mm512_reduce_add_pd(rest)) * 1.000001;
  off += (K + 16) * 0x1.04p-24 * (size + off);
  nodes[0] = size + off < 1e18 ? t : NAN;
  nodes[N] = size;
  nodes[2 * N] = off;
}

/* As an intrinsic, compilers copy the sums around. */
static inline void add_products(__m512i *sums, __m512i codes, __m512i weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(codes), "v"(weights));
}

#define SCREEN_BLOCK(R)                                                                          \
  static void screen_##R(const Screen *s, int64_t p, int64_t n, int64_t N, int64_t K,            \
                         int64_t width, float *low) {                                            \
    __m512i a[R][4];                                                                             \
    const int8_t *w = s->weights + p * PANEL * K;                                                \
    const uint8_t *x = s->codes + n * K;                                                         \
    UNROLL for (int v = 0; v < 4; v++)                                                           \
      UNROLL for (int r = 0; r < R; r++)                                                         \
        a[r][v] = _mm512_loadu_si512(s->starts + p * PANEL + v * WIDTH);                         \
    for (int64_t k = 0; k < K; k += 4, w += 4 * PANEL) {                                         \
      __m512i part[4];                                                                           \
      UNROLL for (int v = 0; v < 4; v++) part[v] = _mm512_loadu_si512(w + v * 64);               \
      UNROLL for (int r = 0; r < R; r++) {                                                       \
        int32_t four;                                                                            \
        memcpy(&four, x + r * K + k, 4);                                                         \
        __m512i value = _mm512_set1_epi32(four);                                                 \
        UNROLL for (int v = 0; v < 4; v++) add_products(&a[r][v], value, part[v]);         \
      }                                                                                          \
    }                                                                                            \
    UNROLL for (int r = 0; r < R; r++) {                                                         \
      float *up = s->upper + (n + r) * width + p * PANEL;                                        \
      __m512 best = _mm512_loadu_ps(low + (n + r) * WIDTH), peak = _mm512_set1_ps(-INFINITY);    \
      UNROLL for (int v = 0; v < 4; v++) {                                                       \
        int64_t o = p * PANEL + v * WIDTH;                                                       \
        wf about = (wf)_mm512_cvtepi32_ps(a[r][v]) * (load_wide(s->steps + o) * s->nodes[n + r]) \
                   + load_wide(s->bias + o);                                                     \
        wf off = load_wide(s->errors + o) * s->nodes[N + n + r]                                  \
                 + load_wide(s->norms + o) * s->nodes[2 * N + n + r] + load_wide(s->slack + o);  \
        store_wide(up + v * WIDTH, about + off);                                                 \
        peak = _mm512_max_ps(peak, (__m512)(about + off));                                       \
        best = _mm512_max_ps((__m512)(about - off), best); /* the latter where the former is none */ \
      }                                                                                          \
      _mm512_storeu_ps(low + (n + r) * WIDTH, best);                                             \
      _mm512_storeu_ps(s->peaks + ((n + r) * width / PANEL + p) * WIDTH, peak);                  \
    }                                                                                            \
  }

SCREEN_BLOCK(1) SCREEN_BLOCK(2) SCREEN_BLOCK(3) SCREEN_BLOCK(4) SCREEN_BLOCK(5) SCREEN_BLOCK(6)

static void screen_panel(const Screen *s, int64_t p, int64_t N, int64_t K, int64_t width, float *low) {
  int64_t tiles = (N + ROUND - 1) / ROUND;
  for (int64_t n = 0, c, t = 0; n < N; n += c, t++) {
    c = (N - n + tiles - t - 1) / (tiles - t);
    switch (c) {
      case 1: screen_1(s, p, n, N, K, width, low); break;
      case 2: screen_2(s, p, n, N, K, width, low); break;
      case 3: screen_3(s, p, n, N, K, width, low); break;
      case 4: screen_4(s, p, n, N, K, width, low); break;
      case 5: screen_5(s, p, n, N, K, width, low); break;
      case 6: screen_6(s, p, n, N, K, width, low); break;
    }
  }
}

/* The largest of some outputs of one node, in rising order, each summed as in a panel. */
static void contest(const Op *op, const float *x, const int64_t *some, int count, float *top,
                    int64_t *first) {
  int64_t K = op->in_width, at[GROUP];
  float total[GROUP] = {0};
  for (int j = 0; j < GROUP; j++) at[j] = some[j < count ? j : 0] * K;
  if (op->dtype == FLOAT32)
    for (int64_t k = 0; k < K; k++)
      UNROLL for (int j = 0; j < GROUP; j++)
        total[j] = fmaf(x[k], ((const float *)op->weight)[at[j] + k], total[j]);
  else
    for (int64_t k = 0; k < K; k++)
      UNROLL for (int j = 0; j < GROUP; j++)
        total[j] = fmaf(x[k], from_bf16(((const uint16_t *)op->weight)[at[j] + k]), total[j]);
  for (int j = 0; j < count; j++) {
    if (op->factor) total[j] *= op->factor;
    if (op->bias) total[j] += read_as(op->bias, some[j], op->bias_dtype);
    if (*first >= 0 && total[j] <= *top) continue;
    *top = total[j];
    *first = some[j];
  }
}

/* Which of some bounds reach the largest lower one; all, where that is none. */
static inline uint32_t reach(const float *bounds, float low) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(bounds), _mm512_set1_ps(low), _CMP_NLT_UQ);
}

/* The first of the largest outputs of one node; without op only how many would have to be summed. */
static int64_t winner(const Op *op, const float *x, const float *upper, const float *peaks,
                      float low, int64_t width) {
  int64_t some[GROUP], first = -1, left = 0;
  int count = 0;
  float top = 0.0f;
  for (int64_t p = 0; p < width; p += PANEL) {
    if (!reach(peaks + p / PANEL * WIDTH, low)) continue;
    for (int64_t o = p; o < p + PANEL; o += WIDTH) {
      uint32_t mask = reach(upper + o, low);
      left += __builtin_popcount(mask);
      for (; op && mask; mask &= mask - 1) {
        some[count++] = o + __builtin_ctz(mask);
        if (count < GROUP) continue;
        contest(op, x, some, count, &top, &first);
        count = 0;
      }
    }
  }
  if (count) contest(op, x, some, count, &top, &first);
  return op ? first : left;
}

/* The first of the largest outputs of each node, [N], of a LINEAR that was laid out. Returns 1; or 0
 * and leaves `chosen` alone where more than `most` sums would be left, or are not finite. */
int64_t isthmus_choose(const Op *op, const Screen *s, const Call *call, int64_t most,
                       int64_t *chosen) {
  int64_t N = call->batch * call->nodes, K = op->in_width, left = 0;
  int64_t panels = (op->out_width + PANEL - 1) / PANEL, width = panels * PANEL;
  const float *x = call->buffers[op->source];
  for (int64_t i = 0; i < call->threads * N * WIDTH; i++) s->lows[i] = -INFINITY;
#ifdef _OPENMP
#pragma omp parallel num_threads(call->threads)
#endif
  {
#ifdef _OPENMP
    float *low = s->lows + omp_get_thread_num() * N * WIDTH;
#pragma omp for
#else
    float *low = s->lows;
#endif
    for (int64_t n = 0; n < N; n++) code(x + n * K, K, s->codes + n * K, s->nodes + n, N);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
    for (int64_t p = 0; p < panels; p++) screen_panel(s, p, N, K, width, low);
#ifdef _OPENMP
#pragma omp for reduction(+ : left)
#endif
    for (int64_t n = 0; n < N; n++) {
      __m512 best = _mm512_loadu_ps(s->lows + n * WIDTH);
      for (int64_t t = 1; t < call->threads; t++)
        best = _mm512_max_ps(best, _mm512_loadu_ps(s->lows + (t * N + n) * WIDTH));
      float top = s->lows[n * WIDTH] = _mm512_reduce_max_ps(best);
      left += winner(0, 0, s->upper + n * width, s->peaks + n * panels * WIDTH, top, width);
    }
    if (left <= most) {
#ifdef _OPENMP
#pragma omp for
#endif
      for (int64_t n = 0; n < N; n++)
        chosen[n] = winner(op, x + n * K, s->upper + n * width, s->peaks + n * panels * WIDTH,
                           s->lows[n * WIDTH], width);
    }
  }
  return left <= most;
}
int64_t isthmus_screens(void) { return 1; }
#else
int64_t isthmus_choose(const Op *op, const Screen *s, const Call *call, int64_t most,
                       int64_t *chosen) {
  (void)op, (void)s, (void)call, (void)most, (void)chosen;
  return 0;
}
int64_t isthmus_screens(void) { return 0; }  /* no products of int8 here */
#endif

/* Floats that a thread needs for up to N nodes over all rows that see `slots` keys. */
int64_t isthmus_scratch(int64_t N, int64_t slots, int64_t widest, int64_t head_dim) {
  int64_t product = 2 * TILE * CHUNK + (N < TILE ? N + 1 : TILE) * widest;
  int64_t attention = QUERIES * (slots + 2 * N + 4 * LANES) + (2 * QUERIES + 1) * head_dim;
  int64_t panels = 2 * BAND * PANEL;
  product = product > panels ? product : panels;
  return product > attention ? product : attention;
}

/* What the caller has to agree on: lanes of a vector, width of a panel, sizes of the structures. */
int64_t isthmus_lanes(void) { return LANES; }
int64_t isthmus_panel(void) { return PANEL; }
int64_t isthmus_op_size(void) { return sizeof(Op); }
int64_t isthmus_call_size(void) { return sizeof(Call); }
int64_t isthmus_screen_size(void) { return sizeof(Screen); }
