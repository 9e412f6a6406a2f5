/* The searches of vectorized.py for the CPU, eight sub-blocks at a time, one per lane of a vector.
 *
 * Compiled on first use by compiled.py, where a C compiler is found. GCC's vector extension, which clang has too. Every sum runs
 * over the elements in order, and nothing is contracted to a fused multiply-add (-ffp-contract=off): llama.cpp's own bytes come
 * from the same operations in the same order. What the searches do is explained in reference.py.
 */
#include <stdint.h>

#define LANES 8
#define MAX_N 32

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf all(float value) { return (vf){0} + value; }
static inline vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
static inline vf absolute_value(vf v) { return (vf)((vi)v & 0x7fffffff); }

static inline int none(vi mask) {
    int any = 0;
    for (int k = 0; k < LANES; k++) any |= mask[k];
    return !any;
}

/* Round half to even by adding 1.5 * 2^23, and read the integer from the mantissa: ggml's nearest_int, also where it overflows. */
static inline vf nearest(vf v, int low, int high) {
    vi l = ((vi)(v + 12582912.f) & 0x007fffff) - 0x00400000;
    vi under = l < low, over = l > high;
    l = (l & ~(under | over)) | ((vi){0} + low & under) | ((vi){0} + high & over);
    return __builtin_convertvector(l, vf);
}

/* Sub-blocks begin .. begin+7 of x (.., n), one per lane; lanes beyond the end repeat the first. */
static void load(vf *to, const float *x, int64_t begin, int64_t end, int n) {
    for (int k = 0; k < LANES; k++) {
        const float *row = x + (begin + k < end ? begin + k : begin) * n;
        for (int i = 0; i < n; i++) to[i][k] = row[i];
    }
}

static void store(float *to, vf v, int64_t begin, int64_t end) {
    for (int k = 0; k < LANES && begin + k < end; k++) to[begin + k] = v[k];
}

static void store_codes(uint8_t *to, const vf *codes, int64_t begin, int64_t end, int n) {
    for (int k = 0; k < LANES && begin + k < end; k++)
        for (int i = 0; i < n; i++) to[(begin + k) * n + i] = (uint8_t)codes[i][k];
}

/* x (.., n) -> the sums of its rows, or of their squares */
void sums(const float *x, int64_t begin, int64_t end, int n, int squares, float *out) {
    for (int64_t row = begin; row < end; row++) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += squares ? x[row * n + i] * x[row * n + i] : x[row * n + i];
        out[row] = sum;
    }
}

/* root mean square of the row + |x| */
void magnitudes(const float *x, int64_t begin, int64_t end, int n, float *out) {
    for (int64_t row = begin; row < end; row++) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += x[row * n + i] * x[row * n + i];
        float root = __builtin_sqrtf(sum / n);
        for (int i = 0; i < n; i++) out[row * n + i] = root + __builtin_fabsf(x[row * n + i]);
    }
}

/* importance * sqrt(sigma2 of the row + x^2) */
void important(const float *x, const float *importance, const float *sigma2, int64_t begin, int64_t end, int n, float *out) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t i = row * n; i < row * n + n; i++)
            out[i] = importance[i] * __builtin_sqrtf(sigma2[row] + x[i] * x[i]);
}

/* (x + offset) / step, rounded and clamped, as codes from 0 on; where step is 0, codes stay. n is a multiple of the lanes. */
void recode(const float *x, const float *step, const float *offset, int64_t begin, int64_t end, int n, int low, int high,
            uint8_t *codes) {
    for (int64_t row = begin; row < end; row++) {
        if (step[row] == 0) continue;
        for (int64_t i = row * n; i < row * n + n; i += LANES) {
            vf v;
            __builtin_memcpy(&v, x + i, sizeof v);
            v = nearest((v + offset[row]) / step[row], low, high) - (float)low;
            for (int k = 0; k < LANES; k++) codes[i + k] = (uint8_t)v[k];
        }
    }
}

/* What a conversion to a byte makes of v + bias, cut off; 0 where v overflowed. */
static inline uint8_t byte_of(float v, float bias, int zero, int top) {
    int code = zero + (__builtin_fabsf(v) < 1e9f ? (int)(v + bias) : 0);
    return code > top ? top : code;
}

/* Blocks without a search: half > 0: x is d * (code - half), as far as the largest magnitude; half = 0: x is d * code + low. */
void plain(const float *x, int64_t begin, int64_t end, int n, int half, int top, float *d_out, float *low_out, uint8_t *codes) {
    for (int64_t row = begin; row < end; row++) {
        const float *v = x + row * n;
        float max = v[0], low = v[0], largest = 0, amax = 0;
        for (int i = 0; i < n; i++) {
            float a = __builtin_fabsf(v[i]);
            largest = a > amax ? v[i] : largest;
            amax = a > amax ? a : amax;
            low = v[i] < low ? v[i] : low;
            max = v[i] > max ? v[i] : max;
        }
        float d = half == 128 ? amax / 127 : half ? largest / -half : (max - low) / top;
        float inverse = d != 0 ? 1 / d : 0;
        uint8_t *to = codes + row * n;
        if (half == 128) /* rounded half away from zero; 0.5 itself would round 0.49999997 up */
            for (int i = 0; i < n; i++)
                to[i] = byte_of(v[i] * inverse, __builtin_copysignf(0.49999997f, v[i]), 128, 255);
        else if (half)
            for (int i = 0; i < n; i++) to[i] = byte_of(v[i] * inverse, half + 0.5f, 0, top);
        else
            for (int i = 0; i < n; i++) to[i] = byte_of((v[i] - low) * inverse, 0.5f, 0, top);
        d_out[row] = d;
        low_out[row] = low;
    }
}

static inline vf distance(vf diff, int absolute) { return absolute ? absolute_value(diff) : diff * diff; }

void affine(const float *x, const float *weights, int64_t begin, int64_t end, int n, int top, const float *factors, int n_factors,
            int absolute, float *scale_out, float *min_out, uint8_t *codes_out) {
    vf xs[MAX_N], ws[MAX_N], ls[MAX_N];
    for (int64_t at = begin; at < end; at += LANES) {
        load(xs, x, at, end, n);
        load(ws, weights, at, end, n);
        vf min = xs[0], max = xs[0], sum_w = ws[0], sum_x = ws[0] * xs[0];
        for (int i = 1; i < n; i++) {
            min = choose(xs[i] < min, xs[i], min);
            max = choose(xs[i] > max, xs[i], max);
            sum_w += ws[i];
            sum_x += ws[i] * xs[i];
        }
        min = choose(min > 0, all(0), min);
        vi flat = max == min;
        vf iscale = all(top) / (max - min), scale = all(1) / iscale, best = all(0);
        vf best_iscale = iscale, best_offset = min;
        for (int i = 0; i < n; i++)
            best += ws[i] * distance(scale * nearest(iscale * (xs[i] - min), 0, top) + min - xs[i], absolute);
        for (int candidate = 0; candidate < n_factors; candidate++) {
            iscale = all(factors[candidate]) / (max - min);
            vf sum_l = all(0), sum_l2 = all(0), sum_xl = all(0), error = all(0);
            for (int i = 0; i < n; i++) {
                vf l = nearest(iscale * (xs[i] - min), 0, top), wl = ws[i] * l;
                ls[i] = l;
                sum_l += wl;
                sum_l2 += wl * l;
                sum_xl += wl * xs[i];
            }
            vf det = sum_w * sum_l2 - sum_l * sum_l;
            vf this_scale = (sum_w * sum_xl - sum_x * sum_l) / det, this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
            vi positive = this_min > 0;
            this_min = choose(positive, all(0), this_min);
            this_scale = choose(positive, sum_xl / sum_l2, this_scale);
            for (int i = 0; i < n; i++) error += ws[i] * distance(this_scale * ls[i] + this_min - xs[i], absolute);
            vi wins = (det > 0) & (error < best);
            best = choose(wins, error, best);
            best_iscale = choose(wins, iscale, best_iscale);
            best_offset = choose(wins, min, best_offset);
            scale = choose(wins, this_scale, scale);
            min = choose(wins, this_min, min); /* the next candidates start from it */
        }
        for (int i = 0; i < n; i++)
            ls[i] = choose(flat, all(0), nearest(best_iscale * (xs[i] - best_offset), 0, top));
        store_codes(codes_out, ls, at, end, n);
        store(scale_out, choose(flat, all(0), scale), at, end);
        store(min_out, -min, at, end);
    }
}

/* The element of largest magnitude, the first of several. */
static vf extreme(const vf *xs, int n, vf *magnitude) {
    vf max = all(0), amax = all(0);
    for (int i = 0; i < n; i++) {
        vf a = absolute_value(xs[i]);
        vi larger = a > amax;
        max = choose(larger, xs[i], max);
        amax = choose(larger, a, amax);
    }
    *magnitude = amax;
    return max;
}

#define TINY 1e-15f /* ggml's GROUP_MAX_EPS */

void symmetric(const float *x, const float *weights, int64_t begin, int64_t end, int n, int half, const float *factors,
               int n_factors, float *scale_out, uint8_t *codes_out) {
    vf xs[MAX_N], ws[MAX_N];
    for (int64_t at = begin; at < end; at += LANES) {
        load(xs, x, at, end, n);
        load(ws, weights, at, end, n);
        vf amax, max = extreme(xs, n, &amax);
        vi zero = amax < TINY;
        vf scale = all(0), best = all(0), best_iscale = all(0);
        for (int candidate = 0; candidate < n_factors; candidate++) { /* the first is -half / max and wins in any case */
            vf iscale = all(factors[candidate]) / max, sum_xl = all(0), sum_l2 = all(0);
            for (int i = 0; i < n; i++) {
                vf l = nearest(iscale * xs[i], -half, half - 1);
                sum_xl += ws[i] * xs[i] * l;
                sum_l2 += ws[i] * l * l;
            }
            vi wins = candidate == 0 ? (vi){0} == 0 : (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2);
            vf this_scale = choose(sum_l2 != 0, sum_xl / sum_l2, all(0));
            scale = choose(wins, this_scale, scale);
            best = choose(wins, this_scale * sum_xl, best);
            best_iscale = choose(wins, iscale, best_iscale);
        }
        for (int i = 0; i < n; i++)
            ws[i] = choose(zero, all(0), nearest(best_iscale * xs[i], -half, half - 1) + (float)half);
        store_codes(codes_out, ws, at, end, n);
        store(scale_out, choose(zero, all(0), scale), at, end);
    }
}

void refined(const float *x, int64_t begin, int64_t end, int n, int half, int n_passes, float *scale_out, uint8_t *codes_out) {
    vf xs[MAX_N], ls[MAX_N];
    for (int64_t at = begin; at < end; at += LANES) {
        load(xs, x, at, end, n);
        vf amax, max = extreme(xs, n, &amax);
        vi zero = amax < TINY;
        vf iscale = all(-half) / max, sum_xl = all(0), sum_l2 = all(0);
        for (int i = 0; i < n; i++) {
            vf w = xs[i] * xs[i], l = nearest(iscale * xs[i], -half, half - 1);
            ls[i] = l;
            sum_xl += w * xs[i] * l;
            sum_l2 += w * l * l;
        }
        for (int pass = 0; pass < n_passes; pass++) {
            vi any = {0};
            for (int i = 0; i < n; i++) {
                vf w = xs[i] * xs[i];
                vf xl = sum_xl - w * xs[i] * ls[i], l2 = sum_l2 - w * ls[i] * ls[i];
                vf l = nearest(xs[i] * l2 / xl, -half, half - 1);
                vi changed = (xl > 0) & (l != ls[i]);
                xl += w * xs[i] * l;
                l2 += w * l * l;
                vi wins = changed & (l2 > 0) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
                ls[i] = choose(wins, l, ls[i]);
                sum_xl = choose(wins, xl, sum_xl);
                sum_l2 = choose(wins, l2, sum_l2);
                any |= wins;
            }
            if (none(any)) break;
        }
        for (int i = 0; i < n; i++) ls[i] = choose(zero, all(0), ls[i] + (float)half);
        store_codes(codes_out, ls, at, end, n);
        store(scale_out, choose(zero | ~(sum_l2 > 0), all(0), sum_xl / sum_l2), at, end);
    }
}

/* Codes as an unsigned byte keeps them. */
static inline vf wrapped(vf codes) { return __builtin_convertvector(__builtin_convertvector(codes, vi) & 255, vf); }

#define LOW (-0x00400000) /* less than any code: not clamped */

void positive(const float *x, const float *weights, int64_t begin, int64_t end, int n, int top, const float *factors,
              int n_factors, int n_passes, float *scale_out, uint8_t *codes_out) {
    vf xs[MAX_N], ws[MAX_N], ls[MAX_N];
    for (int64_t at = begin; at < end; at += LANES) {
        load(xs, x, at, end, n);
        load(ws, weights, at, end, n);
        vf max = all(0), best = all(0), best_iscale = all(0), sum_xl = all(0), sum_l2 = all(0);
        for (int i = 0; i < n; i++) max = choose(xs[i] > max, xs[i], max);
        vi zero = max < TINY;
        for (int candidate = 0; candidate < n_factors; candidate++) {
            vf iscale = all(factors[candidate]) / max, scale = all(1) / iscale, error = all(0);
            for (int i = 0; i < n; i++) {
                vf l = candidate ? nearest(iscale * xs[i], LOW, top) : wrapped(nearest(iscale * xs[i], LOW, -LOW));
                vf diff = xs[i] - scale * l;
                error += ws[i] * diff * diff;
            }
            vi wins = candidate == 0 ? (vi){0} == 0 : error < best;
            best = choose(wins, error, best);
            best_iscale = choose(wins, iscale, best_iscale);
        }
        for (int i = 0; i < n; i++) {
            vf l = nearest(best_iscale * xs[i], LOW, top);
            sum_xl += ws[i] * xs[i] * l;
            sum_l2 += ws[i] * l * l;
            ls[i] = wrapped(l);
        }
        for (int pass = 0; pass < n_passes; pass++) {
            vi any = {0};
            for (int i = 0; i < n; i++) {
                vf xl = sum_xl - ws[i] * xs[i] * ls[i], l2 = sum_l2 - ws[i] * ls[i] * ls[i];
                vf l = nearest(xs[i] * l2 / xl, LOW, top);
                vi changed = (xl > 0) & (l2 > 0) & (l != ls[i]);
                xl += ws[i] * xs[i] * l;
                l2 += ws[i] * l * l;
                vi wins = changed & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
                ls[i] = choose(wins, wrapped(l), ls[i]);
                sum_xl = choose(wins, xl, sum_xl);
                sum_l2 = choose(wins, l2, sum_l2);
                any |= wins;
            }
            if (none(any)) break;
        }
        for (int i = 0; i < n; i++) ls[i] = choose(zero, all(0), ls[i]);
        store_codes(codes_out, ls, at, end, n);
        store(scale_out, choose(zero | ~(sum_l2 > 0), all(0), sum_xl / sum_l2), at, end);
    }
}

/* values (16) ascending; from thresholds[j] on, values[j + 1] is nearer than values[j] */
void nonlinear(const float *x, const float *weights, int64_t begin, int64_t end, int n, const float *values,
               const float *thresholds, const float *factors, int n_factors, float *scale_out) {
    vf xs[MAX_N], ws[MAX_N];
    for (int64_t at = begin; at < end; at += LANES) {
        load(xs, x, at, end, n);
        load(ws, weights, at, end, n);
        vf amax, max = extreme(xs, n, &amax);
        vi zero = amax < TINY;
        vf scale = all(0), best = all(0);
        for (int candidate = 0; candidate <= n_factors; candidate++) {
            vf iscale = candidate == 0 ? all(1) / (-max / values[0]) : all(factors[candidate - 1]) / max;
            vf sum_xq = all(0), sum_q2 = all(0);
            for (int i = 0; i < n; i++) {
                vf scaled = iscale * xs[i], q = all(values[0]);
                for (int j = 0; j < 15; j++) q = choose(scaled >= thresholds[j], all(values[j + 1]), q);
                vf wq = ws[i] * q;
                sum_xq += wq * xs[i];
                sum_q2 += wq * q;
            }
            vi wins = candidate == 0 ? (vi){0} == 0 : (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2);
            vf this_scale = choose(sum_q2 > 0, sum_xq / sum_q2, all(0));
            scale = choose(wins, this_scale, scale);
            best = choose(wins, this_scale * sum_xq, best);
        }
        store(scale_out, choose(zero, all(0), scale), at, end);
    }
}
