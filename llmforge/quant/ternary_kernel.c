/* Products of 8-bit activations and ternary weights, for the CPU.
 *
 * Compiled on first use by ternary_kernel.py, where a C compiler is found. Sums of products of codes are exact integers, and what is
 * computed with them in floats has one order (no contraction to fused multiply-adds: -ffp-contract=off), so every processor and
 * every number of threads gives the same bits. Weights are packed as pack_2bit does it: byte k of packed row r has column k of four
 * rows, a quarter of all rows apart, so that one load of activations meets four rows. GCC's vector extension, which clang has too.
 */
#include <stdint.h>
#if defined __AVX2__
#include <immintrin.h>
#elif defined __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PAIR 2          /* tokens at a time: unpacked weights serve both */
#define COLUMNS 1024    /* at a time: 32 sums of two products of at most 3 * 127 fit in 16 bits */
#define TILE 24         /* tokens whose codes stay in the nearest cache while all rows pass */
#define THREADS_FROM (1 << 20) /* products; waking threads up is not worth it for less, some 20 microseconds */

typedef int32_t ints __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(32)));

struct layer {
    const uint8_t *packed;     /* (quarter, in) */
    const float *scale, *bias; /* (1) or (out, groups); (out) or NULL */
    int64_t in, out, quarter, groups;
    int64_t segment, segments; /* columns that share a step and a scale, and how many of them a row has */
};

/* Up to how many tokens this is the way to go, and not a product of floats with decoded weights; 0: not even for one. With AVX2 and as
 * many threads it was faster for any number of them (1.2 to 3 times as fast as floats, Zen 3); in one thread it must not meet a product
 * of floats in many, or in Apple's matrix unit. */
int64_t most_tokens(void) {
#if !defined __AVX2__ && !defined __ARM_FEATURE_DOTPROD
    return 0;
#elif defined _OPENMP
    return INT64_MAX;
#else
    return 8;
#endif
}

/* sums[t][i] = sum over n <= COLUMNS columns of (code + 1 of row i) * x[t] */
INLINE void dot(const uint8_t *packed, const int8_t *x, int64_t stride, int64_t n, const int tokens, ints *sums) {
    int64_t done = 0;
#if defined __AVX2__
    shorts part[PAIR][4];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) part[t][i] = (shorts){0};
    for (; done + 32 <= n; done += 32) {
        __m256i four = _mm256_loadu_si256((const __m256i *)(packed + done));
        for (int i = 0; i < 4; i++) {
            __m256i codes = _mm256_and_si256(_mm256_srli_epi16(four, 2 * i), _mm256_set1_epi8(3));
            for (int t = 0; t < tokens; t++)
                part[t][i] += (shorts)_mm256_maddubs_epi16(codes, _mm256_loadu_si256((const __m256i *)(x + t * stride + done)));
        }
    }
    for (int t = 0; t < tokens; t++) {
        __m256i wide[4];
        for (int i = 0; i < 4; i++) wide[i] = _mm256_madd_epi16((__m256i)part[t][i], _mm256_set1_epi16(1));
        __m256i rows = _mm256_hadd_epi32(_mm256_hadd_epi32(wide[0], wide[1]), _mm256_hadd_epi32(wide[2], wide[3]));
        sums[t] = (ints)_mm_add_epi32(_mm256_castsi256_si128(rows), _mm256_extracti128_si256(rows, 1));
    }
#elif defined __ARM_FEATURE_DOTPROD
    int32x4_t part[PAIR][4];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) part[t][i] = vdupq_n_s32(0);
    for (; done + 16 <= n; done += 16) {
        uint8x16_t four = vld1q_u8(packed + done);
        for (int i = 0; i < 4; i++)
            for (int t = 0; t < tokens; t++)
                part[t][i] = vdotq_s32(part[t][i], (int8x16_t)(four >> 2 * i & 3), vld1q_s8(x + t * stride + done));
    }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) sums[t][i] = vaddvq_s32(part[t][i]);
#else
    for (int t = 0; t < tokens; t++) sums[t] = (ints){0};
#endif
    if (done == n) return;
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) {
            int32_t sum = 0;
            for (int64_t k = done; k < n; k++) sum += (packed[k] >> 2 * i & 3) * x[t * stride + k];
            sums[t][i] += sum;
        }
}

/* One packed row, so four rows, times a token or a pair of them: y[t][i] = sum over segments of (sum of codes) * (step * scale) */
INLINE void four_rows(const struct layer *layer, int64_t row, const int8_t *x, const float *steps, const int32_t *x_sums,
                      const int tokens, float *y) {
    const struct layer l = *layer;
    const uint8_t *packed = l.packed + row * l.in;
    int64_t rows[4], s = 0;
    for (int i = 0; i < 4; i++) rows[i] = row + i * l.quarter < l.out ? row + i * l.quarter : row; /* the rest is padding */
    floats total[PAIR];
    for (int t = 0; t < tokens; t++) total[t] = (floats){0};
    for (int64_t group = 0; group < (l.groups ? l.groups : 1); group++) {
        floats scales;
        for (int i = 0; i < 4; i++) scales[i] = l.groups ? l.scale[rows[i] * l.groups + group] : l.scale[0];
        for (int64_t end = l.groups ? s + l.segments / l.groups : l.segments; s < end; s++) {
            ints sums[PAIR], part[PAIR];
            for (int t = 0; t < tokens; t++) sums[t] = (ints){0} - x_sums[t * l.segments + s]; /* codes are packed plus 1 */
            for (int64_t k = s * l.segment, stop = k + l.segment; k < stop; k += COLUMNS) {
                dot(packed + k, x + k, l.in, stop - k < COLUMNS ? stop - k : COLUMNS, tokens, part);
                for (int t = 0; t < tokens; t++) sums[t] += part[t];
            }
            for (int t = 0; t < tokens; t++)
                total[t] += __builtin_convertvector(sums[t], floats) * (steps[t * l.segments + s] * scales);
        }
    }
    for (int i = 0; i < 4; i++)
        if (row + i * l.quarter < l.out)
            for (int t = 0; t < tokens; t++) y[t * l.out + rows[i]] = l.bias ? total[t][i] + l.bias[rows[i]] : total[t][i];
}

/* int8_codes of a token: codes, and for every segment its step and the sum of its codes */
static void quantize(const float *x, int64_t n, int64_t group, int64_t segment, float least, int8_t *codes, float *steps,
                     int32_t *sums) {
    for (int64_t begin = 0; begin < n; begin += group) {
        int32_t bits, largest_bits = 0; /* of magnitudes, whose order is that of the floats, NaN last */
        for (int64_t k = begin; k < begin + group; k++) {
            __builtin_memcpy(&bits, x + k, 4);
            bits &= 0x7fffffff;
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        float largest;
        __builtin_memcpy(&largest, &largest_bits, 4);
        largest = largest < least ? least : largest;
        float factor = 1 / largest * 127; /* as torch divides by a tensor */
        for (int64_t k = begin; k < begin + group; k++) {
            float rounded = x[k] * factor + 12582912.f; /* 1.5 * 2^23: rounds half to even, and the integer is in the low bits */
            __builtin_memcpy(&bits, &rounded, 4);
            codes[k] = (int8_t)bits;
        }
        for (int64_t at = begin; at < begin + group; at += segment) {
            int32_t sum = 0;
            for (int64_t k = at; k < at + segment; k++) sum += codes[k];
            steps[at / segment] = largest / 127; /* of infinity: 0 * infinity will be NaN, as it should */
            sums[at / segment] = sum;
        }
    }
}

/* x (tokens, in) -> y (tokens, out). x_group: columns that share a step; groups: of a row's scales, 0 = one scale for all;
 * space: for 2 * tokens * segments + tokens * in / 4 floats. */
void linear(const float *x, const uint8_t *packed, const float *scale, const float *bias, float *space, float *y, int64_t tokens,
            int64_t in, int64_t out, int64_t x_group, int64_t groups, int64_t segment, float least, int threads) {
    const struct layer layer = {packed, scale, bias, in, out, (out + 3) / 4, groups, segment, in / segment};
    float *steps = space;
    int32_t *sums = (int32_t *)(steps + tokens * layer.segments);
    int8_t *codes = (int8_t *)(sums + tokens * layer.segments);
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens * in * out >= THREADS_FROM)
    {
#pragma omp for
        for (int64_t t = 0; t < tokens; t++)
            quantize(x + t * in, in, x_group, segment, least, codes + t * in, steps + t * layer.segments,
                     sums + t * layer.segments);
        for (int64_t begin = 0; begin < tokens; begin += TILE) {
            int64_t end = begin + TILE < tokens ? begin + TILE : tokens;
#pragma omp for nowait
            for (int64_t row = 0; row < layer.quarter; row++) {
                int64_t t = begin;
                for (; t + PAIR <= end; t += PAIR)
                    four_rows(&layer, row, codes + t * in, steps + t * layer.segments, sums + t * layer.segments, PAIR,
                              y + t * out);
                for (; t < end; t++)
                    four_rows(&layer, row, codes + t * in, steps + t * layer.segments, sums + t * layer.segments, 1,
                              y + t * out);
            }
        }
    }
}

/* (quarter, in) codes -> (out, in) floats */
void decode(const uint8_t *packed, const float *scale, float *weight, int64_t in, int64_t out, int64_t groups, int threads) {
    int64_t quarter = (out + 3) / 4, size = groups ? in / groups : in;
#pragma omp parallel for num_threads(threads) if (threads > 1 && in * out >= THREADS_FROM)
    for (int64_t row = 0; row < out; row++) {
        const uint8_t *bytes = packed + row % quarter * in;
        int shift = row / quarter * 2;
        for (int64_t begin = 0; begin < in; begin += size) {
            float factor = groups ? scale[row * groups + begin / size] : scale[0];
            for (int64_t k = begin; k < begin + size; k++) weight[row * in + k] = ((bytes[k] >> shift & 3) - 1) * factor;
        }
    }
}
