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

/* One binary for old and new processors: the loader picks the widest version that runs. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "fma", "default")))
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

/* out[s] = w + Σᵢ c[s][i] dᵢ, each of n entries; dᵢ lie `stride` apart, out[s] `apart`. */
INLINE void merge(const float *w, const float *d, int64_t stride, const float *const *c, int64_t experts, int64_t n, float *out,
                  int64_t apart)
{
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        vector a[SAMPLES], b[SAMPLES];
        for (int s = 0; s < SAMPLES; s++) a[s] = *(const vector *)(w + k), b[s] = *(const vector *)(w + k + LANES);
        for (int64_t i = 0; i < experts; i++) {
            vector p = *(const vector *)(d + i * stride + k), q = *(const vector *)(d + i * stride + k + LANES);
            for (int s = 0; s < SAMPLES; s++) a[s] += c[s][i] * p, b[s] += c[s][i] * q;
        }
        for (int s = 0; s < SAMPLES; s++)
            *(vector *)(out + s * apart + k) = a[s], *(vector *)(out + s * apart + k + LANES) = b[s];
    }
    for (; k < n; k++)
        for (int s = 0; s < SAMPLES; s++) {
            float sum = w[k];
            for (int64_t i = 0; i < experts; i++) sum += c[s][i] * d[i * stride + k];
            out[s * apart + k] = sum;
        }
}

/* y[r] = Σₖ w[r][k] x[k] for a panel, or that more than it was. */
INLINE void multiply(const float (*w)[STEP], const float *x, int64_t n, float *y, int64_t rows, int more)
{
    vector sum[ROWS] = {0};
    for (int64_t k = 0; k < n; k++) {
        vector v = *(const vector *)(x + k * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) sum[r] += w[r][k] * v;
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
        if (r < rows) {
            vector *to = (vector *)(y + r * LANES);
            *to = more ? *to + sum[r] : sum[r];
        }
}

/* y[b] = (W + Σᵢ c[b][i] Dᵢ) x[b] for each sample: x [samples, panels, n, 8], c [samples, experts], W [m, n], Dᵢ [m, n] that lie
 * `stride` apart, y [samples, panels, …, 8], whose panels lie `apart`. */
WIDE EXPORT void eutectic_per_sample(const float *x, const float *c, const float *w, const float *d, int64_t stride, float *y,
                                     int64_t apart, int64_t samples, int64_t panels, int64_t experts, int64_t m, int64_t n)
{
    float merged[SAMPLES][ROWS][STEP];
    for (int64_t r = 0; r < ROWS; r++) /* rows past the last are multiplied, too, and forgotten */
        for (int64_t k = 0; k < STEP; k++)
            for (int s = 0; s < SAMPLES; s++) merged[s][r][k] = 0;
    for (int64_t k = 0; k < n; k += DEPTH) {
        int64_t depth = n - k < DEPTH ? n - k : DEPTH;
        for (int64_t r = 0; r < m; r += ROWS) {
            int64_t rows = m - r < ROWS ? m - r : ROWS;
            for (int64_t b = 0; b < samples; b += SAMPLES) {
                const float *own[SAMPLES]; /* samples past the last are merged as the last, and not multiplied */
                for (int s = 0; s < SAMPLES; s++) own[s] = c + (b + s < samples ? b + s : samples - 1) * experts;
                for (int64_t i = 0; i < rows; i++) {
                    int64_t at = (r + i) * n + k;
                    merge(w + at, d + at, stride, own, experts, depth, merged[0][i], ROWS * STEP);
                }
                for (int s = 0; s < SAMPLES && b + s < samples; s++)
                    for (int64_t p = (b + s) * panels; p < (b + s + 1) * panels; p++)
                        multiply(merged[s], x + (p * n + k) * LANES, depth, y + p * apart + r * LANES, rows, k > 0);
            }
        }
    }
}

/* out += c[0] D₀ + c[1] D₁ …, each of `size` entries: values, and how far each lies behind the one before. */
EXPORT void eutectic_scatter(const uint8_t *gaps, const float *values, int64_t n, const float *c, int64_t size, float *out)
{
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        for (at += gaps[i]; at >= size; at -= size) c++;
        out[at] += *c * values[i];
    }
}

/* ── the module: empty, it is there so that Python's build tools find and place this file ─────────────────────────── */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products_loops", "The compiled half of _products.py.", 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__products_loops(void) { return PyModule_Create(&module); }
