/* The inner loops of merging that array operations leave slow.  Every function here has a pure counterpart in
 * _native.py that gives the same bits; a build without a compiler only runs slower.
 *
 * Called through ctypes, which lets go of the interpreter's lock.  Nothing is allocated but the scratch of magprune.
 * Built without contraction of a * b + c, and without any reordering of sums.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* One binary for old and new processors: the loader picks the widest version that runs. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

/* ── reading and writing ─────────────────────────────────────────────────────────────────────────────────────────── */

/* out = x - minus (or x, without minus) in float32; returns whether x is finite everywhere. */
WIDE EXPORT int eutectic_widen_bf16(const uint16_t *restrict x, const float *restrict minus, float *restrict out, int64_t n)
{
    uint32_t odd = 0;
    if (minus)
        for (int64_t i = 0; i < n; i++) {
            uint32_t b = (uint32_t)x[i] << 16;
            odd |= (b & INFINITE) == INFINITE;
            out[i] = float_of(b) - minus[i];
        }
    else
        for (int64_t i = 0; i < n; i++) {
            uint32_t b = (uint32_t)x[i] << 16;
            odd |= (b & INFINITE) == INFINITE;
            out[i] = float_of(b);
        }
    return !odd;
}

WIDE EXPORT int eutectic_widen_f32(const float *restrict x, const float *restrict minus, float *restrict out, int64_t n)
{
    uint32_t odd = 0;
    if (minus)
        for (int64_t i = 0; i < n; i++) {
            odd |= (bits_of(x[i]) & INFINITE) == INFINITE;
            out[i] = x[i] - minus[i];
        }
    else
        for (int64_t i = 0; i < n; i++) {
            odd |= (bits_of(x[i]) & INFINITE) == INFINITE;
            out[i] = x[i];
        }
    return !odd;
}

static inline uint16_t to_bf16(float x) { uint32_t b = bits_of(x); return (uint16_t)((b + 0x7FFFu + (b >> 16 & 1u)) >> 16); }

/* out = x, or x + base with a base, rounded to the nearest; where x is 0 the base as it is.  Returns whether all of it is
 * finite; if not, a NaN may have become a number. */
WIDE EXPORT int eutectic_narrow_bf16(const float *restrict x, const float *restrict base, uint16_t *restrict out, int64_t n)
{
    uint32_t odd = 0;
    for (int64_t i = 0; i < n; i++) odd |= (bits_of(x[i]) & INFINITE) == INFINITE;
    if (base)
        for (int64_t i = 0; i < n; i++) {
            float sum = x[i] == 0.0f ? base[i] : x[i] + base[i];
            out[i] = to_bf16(sum);
            odd |= (out[i] & 0x7F80u) == 0x7F80u;
        }
    else
        for (int64_t i = 0; i < n; i++) {
            out[i] = to_bf16(x[i]);
            odd |= (out[i] & 0x7F80u) == 0x7F80u;
        }
    return !odd;
}

WIDE EXPORT int eutectic_narrow_f32(const float *restrict x, const float *restrict base, float *restrict out, int64_t n)
{
    uint32_t odd = 0;
    for (int64_t i = 0; i < n; i++) {
        float sum = !base ? x[i] : x[i] == 0.0f ? base[i] : x[i] + base[i];
        odd |= (bits_of(sum) & INFINITE) == INFINITE;
        out[i] = sum;
    }
    return !odd;
}

/* ── order statistics ────────────────────────────────────────────────────────────────────────────────────────────── */

/* counts[b] += how many magnitudes have b as the upper half of their bits. */
EXPORT void eutectic_count_high(const uint32_t *x, int64_t n, int64_t *counts)
{
    for (int64_t i = 0; i < n; i++) counts[(x[i] & MAGNITUDE) >> 16]++;
}

/* Of the magnitudes with `bin` as the upper half of their bits: counts[b] += how many have b as the lower half.  They are few:
 * blocks without any are passed over. */
WIDE EXPORT void eutectic_count_low(const uint32_t *x, int64_t n, uint32_t bin, int64_t *counts)
{
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        uint32_t any = 0;
        for (int j = 0; j < 32; j++) any |= (x[i + j] & MAGNITUDE) >> 16 == bin;
        if (any)
            for (int j = 0; j < 32; j++)
                if ((x[i + j] & MAGNITUDE) >> 16 == bin) counts[x[i + j] & 0xFFFFu]++;
    }
    for (; i < n; i++)
        if ((x[i] & MAGNITUDE) >> 16 == bin) counts[x[i] & 0xFFFFu]++;
}

/* out = x where the bits of its magnitude lie in least … most, else 0. */
WIDE EXPORT void eutectic_band(const float *restrict x, int64_t n, uint32_t least, uint32_t most, float *restrict out)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = bits_of(x[i]) & MAGNITUDE;
        out[i] = float_of(bits_of(x[i]) & (size >= least && size <= most ? 0xFFFFFFFFu : 0));
    }
}

/* ── sums over experts and over entries ──────────────────────────────────────────────────────────────────────────── */

#define TILE 1024

/* out = Σ w x over the K rows of x, in their order; without weights Σ x. */
WIDE EXPORT void eutectic_sum(const float *restrict x, int64_t k, int64_t n, const float *restrict weights, float *restrict out)
{
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE;
        for (int64_t e = 0; e < k; e++) {
            const float *row = x + e * n + at;
            float *sum = out + at;
            if (weights) {
                float w = weights[e];
                if (e == 0) for (int64_t i = 0; i < m; i++) sum[i] = row[i] * w;
                else for (int64_t i = 0; i < m; i++) sum[i] += row[i] * w;
            } else if (e == 0) memcpy(sum, row, (size_t)m * sizeof(float));
            else for (int64_t i = 0; i < m; i++) sum[i] += row[i];
        }
    }
}

/* Of the K rows of x, those that agree in sign with the sum of all: Σ w x / Σ |w|, without weights their mean; 0 where there
 * is none. */
WIDE EXPORT void eutectic_agree(const float *restrict x, int64_t k, int64_t n, const float *restrict weights, float *restrict out)
{
    float total[TILE], sum[TILE], mass[TILE];
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE;
        for (int64_t i = 0; i < m; i++) total[i] = x[at + i], sum[i] = 0, mass[i] = 0;
        for (int64_t e = 1; e < k; e++)
            for (int64_t i = 0; i < m; i++) total[i] += x[e * n + at + i];
        for (int64_t e = 0; e < k; e++) {
            const float *row = x + e * n + at;
            float w = weights ? weights[e] : 1.0f, size = w < 0 ? -w : w;
            for (int64_t i = 0; i < m; i++) {
                int with = (row[i] > 0) & (total[i] > 0), against = (row[i] < 0) & (total[i] < 0);
                float weighted = row[i] * w;
                sum[i] += with | against ? weighted : 0.0f;
                mass[i] += with | against ? size : 0.0f;
            }
        }
        for (int64_t i = 0; i < m; i++) out[at + i] = sum[i] / (mass[i] > 0 ? mass[i] : 1.0f);
    }
}

/* out = Σ (x − mean)² over the K rows of x, in double, rounded to float. */
WIDE EXPORT void eutectic_spread(const float *restrict x, int64_t k, int64_t n, float *restrict out)
{
    double mean[TILE], sum[TILE];
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t m = n - at < TILE ? n - at : TILE;
        for (int64_t i = 0; i < m; i++) mean[i] = (double)x[at + i], sum[i] = 0;
        for (int64_t e = 1; e < k; e++)
            for (int64_t i = 0; i < m; i++) mean[i] += (double)x[e * n + at + i];
        for (int64_t i = 0; i < m; i++) mean[i] /= (double)k;
        for (int64_t e = 0; e < k; e++)
            for (int64_t i = 0; i < m; i++) {
                double d = (double)x[e * n + at + i] - mean[i];
                sum[i] += d * d;
            }
        for (int64_t i = 0; i < m; i++) out[at + i] = (float)sum[i];
    }
}

/* out[b] = Σ x y over block b of 4,096 entries, in double: the two halves of what is left are added until one is. */
WIDE EXPORT void eutectic_dots(const float *restrict x, const float *restrict y, int64_t n, double *restrict out)
{
    double sum[4096];
    for (int64_t at = 0; at < n; at += 4096) {
        int64_t m = n - at < 4096 ? n - at : 4096;
        for (int64_t i = 0; i < m; i++) sum[i] = (double)x[at + i] * (double)y[at + i];
        for (int64_t i = m; i < 4096; i++) sum[i] = 0;
        for (int half = 2048; half; half /= 2)
            for (int i = 0; i < half; i++) sum[i] += sum[i + half];
        out[at / 4096] = sum[0];
    }
}

/* ── random numbers ──────────────────────────────────────────────────────────────────────────────────────────────── */

/* Philox-4x64-10 (Salmon et al., SC 2011) as numpy runs it, where the first block of a stream has the counter 1. */
static inline void philox(uint64_t counter, uint64_t k0, uint64_t k1, uint32_t out[8])
{
    uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c0, b = (unsigned __int128)0xCA5A826395121157u * c2;
        uint64_t n0 = (uint64_t)(b >> 64) ^ c1 ^ k0, n2 = (uint64_t)(a >> 64) ^ c3 ^ k1;
        c1 = (uint64_t)b, c3 = (uint64_t)a, c0 = n0, c2 = n2;
        k0 += 0x9E3779B97F4A7C15u, k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = (uint32_t)c0, out[1] = (uint32_t)(c0 >> 32), out[2] = (uint32_t)c1, out[3] = (uint32_t)(c1 >> 32);
    out[4] = (uint32_t)c2, out[5] = (uint32_t)(c2 >> 32), out[6] = (uint32_t)c3, out[7] = (uint32_t)(c3 >> 32);
}

/* 32-bit numbers start … start + n of the stream with the key (k0, k1), eight a counter, the low half of a word first. */
EXPORT void eutectic_random(uint64_t k0, uint64_t k1, int64_t start, int64_t n, uint32_t *out)
{
    int64_t at = start, end = start + n;
    while (at < end) {
        uint32_t numbers[8];
        philox((uint64_t)(at / 8) + 1, k0, k1, numbers);
        int64_t skip = at % 8, count = 8 - skip < end - at ? 8 - skip : end - at;
        memcpy(out + (at - start), numbers + skip, (size_t)count * sizeof(uint32_t));
        at += count;
    }
}

/* out = x / p where the element's number is below the threshold (p · 2³², rounded up), else 0. */
WIDE EXPORT void eutectic_toss(const float *restrict x, const uint32_t *restrict coins, int64_t n, uint64_t threshold, float p,
                               float *restrict out)
{
    if (threshold > UINT32_MAX)
        for (int64_t i = 0; i < n; i++) out[i] = x[i] / p;
    else
        for (int64_t i = 0; i < n; i++) {
            float kept = x[i] / p;
            out[i] = coins[i] < (uint32_t)threshold ? kept : 0.0f;
        }
}

/* rank[i] = how many magnitudes of the row are smaller than that of x[i], or equal and before it.  A radix sort that skips
 * the bits in which all agree; `a` and `b` are scratch of n entries each, which hold magnitude and place. */
static void ranks(const uint32_t *restrict x, int64_t n, uint64_t *a, uint64_t *b, int32_t *restrict rank)
{
    uint32_t all = MAGNITUDE, any = 0, counts[1 << 11];
    for (int64_t i = 0; i < n; i++) all &= x[i], any |= x[i] & MAGNITUDE;
    uint32_t varying = any & ~all;
    int shift = varying ? __builtin_ctz(varying) : 0, bits = varying ? 32 - __builtin_clz(varying) - shift : 0;
    for (int64_t i = 0; i < n; i++) a[i] = (uint64_t)((x[i] & MAGNITUDE) >> shift) << 32 | (uint64_t)i;
    for (int passes = (bits + 10) / 11, done = 0; passes > 0; passes--) {
        int width = (bits - done + passes - 1) / passes, down = 32 + done;
        uint64_t mask = (1u << width) - 1;
        memset(counts, 0, sizeof(uint32_t) << width);
        for (int64_t i = 0; i < n; i++) counts[a[i] >> down & mask]++;
        uint32_t at = 0;
        for (uint64_t bin = 0; bin <= mask; bin++) {
            uint32_t found = counts[bin];
            counts[bin] = at, at += found;
        }
        done += width;
        if (passes == 1) {
            for (int64_t i = 0; i < n; i++) rank[(uint32_t)a[i]] = (int32_t)counts[a[i] >> down & mask]++;
            return;
        }
        for (int64_t i = 0; i < n; i++) b[counts[a[i] >> down & mask]++] = a[i];
        uint64_t *turn = a;
        a = b, b = turn;
    }
    for (int64_t i = 0; i < n; i++) rank[i] = (int32_t)i; /* all are equal */
}

WIDE static void toss_by_rank(const float *restrict x, const uint32_t *restrict coins, const int32_t *restrict rank, int64_t n,
                              double least, double step, float *restrict out)
{
    for (int64_t i = 0; i < n; i++) {
        double chance = least + step * (double)rank[i];
        float kept = x[i] / (float)chance;
        out[i] = (double)coins[i] < chance * 4294967296.0 ? kept : 0.0f;
    }
}

/* Per row of n, keep the entry of magnitude rank r = 0 … n − 1 with probability least + step · r, and divide it by that; else
 * 0.  Returns 0 if there is no memory for the scratch. */
EXPORT int eutectic_magprune(const float *x, const uint32_t *coins, int64_t rows, int64_t n, double least, double step, float *out)
{
    uint64_t *scratch = malloc((size_t)n * (2 * sizeof(uint64_t) + sizeof(int32_t)));
    if (!scratch) return 0;
    int32_t *rank = (int32_t *)(scratch + 2 * n);
    for (int64_t row = 0; row < rows; row++, x += n, coins += n, out += n) {
        ranks((const uint32_t *)(const void *)x, n, scratch, scratch + n, rank);
        toss_by_rank(x, coins, rank, n, least, step, out);
    }
    free(scratch);
    return 1;
}

/* ── the module: empty, it is there so that Python's build tools find and place this file ─────────────────────────── */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native_loops", "The compiled half of _native.py.", 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__native_loops(void) { return PyModule_Create(&module); }
