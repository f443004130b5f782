/* The inner loops of layers whose matrix is merged anew for each sample.  _products.py has the same in array operations; these
 * sum in another order.  Called through ctypes, which lets go of the interpreter's lock.
 *
 * A panel is 8 tokens of a sample, side by side: one vector.  12 rows of the matrices of 4 samples are merged at a time, 768
 * entries each, and multiplied while they are in the second-level cache; 12 sums of 8 tokens fill the registers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* One binary for old and new processors: the loader picks the widest version that runs.  Not "avx512f", which alone has no
 * instruction that multiplies and adds vectors of 8. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "fma", "default")))
#else
#define WIDE __attribute__((target_clones("fma", "default")))
#endif
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = 8,
    ROWS = 12,
    DEPTH = 768,
    SAMPLES = 4,
    STEP = DEPTH + 16 /* rows that lie a power of two apart would share one set of the cache */
};

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* out[s] = w + Σᵢ c[s][i] dᵢ of `some` samples, each of n entries; dᵢ lie `stride` apart, out[s] ROWS · STEP. */
INLINE void merge(int some, const float *w, const float *d, int64_t stride, const float *const *c, int64_t experts, int64_t n,
                  float *out)
{
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        vector a[SAMPLES], b[SAMPLES];
        for (int s = 0; s < some; s++) a[s] = *(const vector *)(w + k), b[s] = *(const vector *)(w + k + LANES);
        for (int64_t i = 0; i < experts; i++) {
            vector p = *(const vector *)(d + i * stride + k), q = *(const vector *)(d + i * stride + k + LANES);
            for (int s = 0; s < some; s++) a[s] += c[s][i] * p, b[s] += c[s][i] * q;
        }
        for (int s = 0; s < some; s++) {
            vector *to = (vector *)(out + s * ROWS * STEP + k);
            to[0] = a[s], to[1] = b[s];
        }
    }
    for (; k < n; k++)
        for (int s = 0; s < some; s++) {
            float sum = w[k];
            for (int64_t i = 0; i < experts; i++) sum += c[s][i] * d[i * stride + k];
            out[s * ROWS * STEP + k] = sum;
        }
}

/* y[t][r] = Σₖ w[r][k] x[k][t] for a panel, or that more than it was; tokens of y lie `m` apart. */
INLINE void multiply(const float (*w)[STEP], const float *x, int64_t n, float *y, int64_t m, int64_t rows, int64_t tokens, int more)
{
    vector sum[ROWS] = {0};
    for (int64_t k = 0; k < n; k++) {
        vector v = *(const vector *)(x + k * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) sum[r] += w[r][k] * v;
    }
    float turned[LANES][ROWS];
    for (int t = 0; t < LANES; t++)
        for (int r = 0; r < ROWS; r++) turned[t][r] = sum[r][t];
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) y[t * m + r] = more ? y[t * m + r] + turned[t][r] : turned[t][r];
}

/* Tokens [samples, tokens, n], that lie `stride` apart, into panels [samples, ⌈tokens / 8⌉, n, 8], the last filled with zeros. */
WIDE EXPORT void eutectic_panels(const float *restrict x, int64_t samples, int64_t tokens, int64_t n, int64_t stride,
                                 float *restrict out)
{
    for (int64_t b = 0; b < samples; b++, x += tokens * stride)
        for (int64_t t = 0; t < tokens; t += LANES, out += n * LANES)
            for (int64_t k = 0; k < n; k++)
                for (int64_t l = 0; l < LANES; l++) out[k * LANES + l] = t + l < tokens ? x[(t + l) * stride + k] : 0;
}

/* y[b] = (W + Σᵢ c[b][i] Dᵢ) x[b] for each sample, or that more: x in panels, c [samples, experts], W [rows, n] and Dᵢ with n no
 * more than DEPTH, whose rows lie `w_row` and `d_row` apart, y [samples, tokens, …] whose tokens lie `m` apart.  Dᵢ lie `stride`
 * apart, their groups of ROWS rows `group`. */
WIDE EXPORT void eutectic_per_sample(const float *x, const float *c, const float *w, int64_t w_row, const float *d, int64_t stride,
                                     int64_t d_row, int64_t group, float *y, int64_t m, int64_t samples, int64_t tokens,
                                     int64_t experts, int64_t rows, int64_t n, int more)
{
    int64_t panels = (tokens + LANES - 1) / LANES;
    float merged[SAMPLES][ROWS][STEP];
    for (int s = 0; s < SAMPLES; s++) /* rows past the last are multiplied, too, and forgotten */
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t k = 0; k < STEP; k++) merged[s][r][k] = 0;
    for (int64_t r = 0; r < rows; r += ROWS, w += ROWS * w_row, d += group) {
        int64_t some = rows - r < ROWS ? rows - r : ROWS;
        for (int64_t b = 0; b < samples; b += SAMPLES) {
            const float *own[SAMPLES]; /* samples past the last are merged as the last, and not multiplied */
            for (int s = 0; s < SAMPLES; s++) own[s] = c + (b + s < samples ? b + s : samples - 1) * experts;
            for (int64_t i = 0; i < some; i++)
                if (samples > 1) merge(SAMPLES, w + i * w_row, d + i * d_row, stride, own, experts, n, merged[0][i]);
                else merge(1, w + i * w_row, d + i * d_row, stride, own, experts, n, merged[0][i]);
            for (int s = 0; s < SAMPLES && b + s < samples; s++)
                for (int64_t p = 0; p < panels; p++) {
                    int64_t t = p * LANES, left = tokens - t < LANES ? tokens - t : LANES;
                    const float *from = x + ((b + s) * panels + p) * n * LANES;
                    multiply(merged[s], from, n, y + ((b + s) * tokens + t) * m + r, m, some, left, more);
                }
        }
    }
}

/* out[g] += Σᵢ c[i] D[g][i] for groups g of `size` entries: values, and how far each lies behind the one before.  `out` has
 * `length` entries, and what lies past them is left out: zeros between far entries may, in a last group that is not full. */
EXPORT void eutectic_scatter(const uint8_t *restrict gaps, const float *restrict values, int64_t n, const float *restrict c,
                             int64_t experts, int64_t size, float *restrict out, int64_t length)
{
    int64_t at = 0, i = 0;
    float factor = c[0];
    for (int64_t e = 0; e < n; e++) {
        for (at += gaps[e]; at >= size; at -= size) {
            if (++i == experts) i = 0, out += size, length -= size;
            factor = c[i];
        }
        if (at < length) out[at] += factor * values[e];
    }
}

/* What _products.py has to have, too. */
EXPORT const int64_t eutectic_sizes[] = {ROWS, DEPTH, LANES};

/* ── the module: empty, it is there so that Python's build tools find and place this file ─────────────────────────── */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products_loops", "The compiled half of _products.py.", 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__products_loops(void) { return PyModule_Create(&module); }
