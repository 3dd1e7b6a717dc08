// CPU kernels behind fused.py: BatchNorm with what surrounds it in one pass a direction, and the
// weight gradient of 3x3 convolutions in bf16.
//
// Maps are channels-last: `rows` pixels of C numbers one after the other, C in {16, 32, 64}. Sums
// are fp32 within a chunk of 128 pixels, float64 across chunks. Work is cut by the number of chunks
// or images and the number of threads alone: the same threads give the same bits.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

struct bf16 { uint16_t bits; };

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline void narrow(float x, float &out) { out = x; }
inline void narrow(float x, bf16 &out) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    out.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int64_t CHUNK = 128;  // pixels; what is read twice stays in the first cache

// Call work(first, last, totals) for every chunk of rows; totals are summed over threads in order.
template <int C, class Work>
void over_chunks(int64_t rows, int threads, double *sums, Work work) {
    int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<double> partial(size_t(threads) * 2 * C, 0.0);
    // A loop over shares, not a use of the thread's number: right also if fewer threads come.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t first = chunks * t / threads, last = chunks * (t + 1) / threads;
        for (int64_t chunk = first; chunk < last; chunk++)
            work(chunk * CHUNK, std::min(rows, (chunk + 1) * CHUNK), &partial[size_t(t) * 2 * C]);
    }
    for (int c = 0; c < 2 * C; c++) {
        double total = 0;
        for (int t = 0; t < threads; t++) total += partial[size_t(t) * 2 * C + c];
        sums[c] = total;
    }
}

// sums[0:C] of x, sums[C:2C] of x squared. Deviations from the chunk's mean first: no cancellation.
template <class T, int C>
void statistics(const T *x, int64_t rows, double *sums, int threads) {
    over_chunks<C>(rows, threads, sums, [=](int64_t first, int64_t last, double *total) {
        float sum[C] = {}, squares[C] = {}, mean[C];
        for (int64_t r = first; r < last; r++)
            for (int c = 0; c < C; c++) sum[c] += wide(x[r * C + c]);
        for (int c = 0; c < C; c++) mean[c] = sum[c] / float(last - first);
        for (int64_t r = first; r < last; r++)
            for (int c = 0; c < C; c++) {
                float d = wide(x[r * C + c]) - mean[c];
                squares[c] += d * d;
            }
        for (int c = 0; c < C; c++) {
            double n = double(last - first), m = mean[c];
            // sum((x-m)^2) = sum(x^2) - 2 m sum(x) + n m^2, whatever m's own rounding
            total[c] += sum[c];
            total[C + c] += double(squares[c]) + 2 * m * double(sum[c]) - n * m * m;
        }
    });
}

// out = relu(scale * x + shift + residual), residual may be null.
template <class T, int C, bool HAS_RESIDUAL, bool RELU>
void apply(const T *x, const float *scale, const float *shift, const T *residual, T *out,
           int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma GCC ivdep
        for (int c = 0; c < C; c++) {
            float y = wide(x[r * C + c]) * scale[c] + shift[c];
            if (HAS_RESIDUAL) y += wide(residual[r * C + c]);
            if (RELU) y = y < 0 ? 0.0f : y;  // NaN stays
            narrow(y, out[r * C + c]);
        }
}

// g = (grad1 + grad2) where the output was positive. sums[0:C] of g, sums[C:2C] of g * (x - mean).
// With a residual the output is looked at and g is written down; without, both are found again.
template <class T, int C, bool HAS_RESIDUAL, bool HAS_SECOND, bool RELU>
void grad_statistics(const T *grad1, const T *grad2, const T *x, const T *out, const float *mean,
                     const float *scale, const float *shift, T *g, int64_t rows, double *sums,
                     int threads) {
    over_chunks<C>(rows, threads, sums, [=](int64_t first, int64_t last, double *total) {
        float sum[C] = {}, dot[C] = {};
        for (int64_t r = first; r < last; r++)
#pragma GCC ivdep
            for (int c = 0; c < C; c++) {
                int64_t i = r * C + c;
                float value = wide(grad1[i]), from = wide(x[i]);
                if (HAS_SECOND) value += wide(grad2[i]);
                if (RELU) {
                    float y = HAS_RESIDUAL ? wide(out[i]) : from * scale[c] + shift[c];
                    value = y > 0 ? value : 0.0f;
                }
                if (HAS_RESIDUAL || HAS_SECOND) narrow(value, g[i]);
                sum[c] += value;
                dot[c] += value * (from - mean[c]);
            }
        for (int c = 0; c < C; c++) {
            total[c] += sum[c];
            total[C + c] += dot[c];
        }
    });
}

// grad_x = a * (g - b - (x - mean) * d), g masked here when it was not written down.
template <class T, int C, bool MASK>
void grad_apply(const T *g, const T *x, const float *mean, const float *scale, const float *shift,
                const float *b, const float *d, T *grad_x, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
#pragma GCC ivdep
        for (int c = 0; c < C; c++) {
            int64_t i = r * C + c;
            float from = wide(x[i]), value = wide(g[i]);
            if (MASK) value = from * scale[c] + shift[c] > 0 ? value : 0.0f;
            narrow(scale[c] * (value - b[c] - (from - mean[c]) * d[c]), grad_x[i]);
        }
}

#ifdef __AVX512BF16__
inline __m512bh pair_of(const uint32_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

// Interleave two pixels: out[c] = (a[c], b[c]); null is zeros.
template <int C>
inline void interleave(const uint16_t *a, const uint16_t *b, uint32_t *out) {
    for (int c = 0; c < C; c++)
        out[c] = (a ? uint32_t(a[c]) : 0u) | (b ? uint32_t(b[c]) << 16 : 0u);
}

// weight_grad[co][ky][kx][ci] = sum over n, i, j of g[n,i,j,co] * x[n, i+ky-1, j+kx-1, ci].
// dpbf16ps adds products of two pixels at a time; both alignments of pairs of x are packed once an
// image. A tile of 8 output channels, 16 input channels and 3 taps stays in registers.
template <int C>
void weight_gradient(const uint16_t *x, const uint16_t *g, float *weight_grad, int images, int H,
                     int threads) {
    const int W = H, pairs = W / 2, size = C * 9 * C;
    std::vector<float> partial(size_t(threads) * size, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *own = &partial[size_t(t) * size];
        std::vector<uint32_t> packed_g(size_t(H) * pairs * C), even(size_t(H) * pairs * C),
            odd(size_t(H) * (pairs + 1) * C);
        for (int n = images * t / threads; n < images * (t + 1) / threads; n++) {
            for (int i = 0; i < H; i++) {
                const uint16_t *gr = g + (size_t(n) * H + i) * W * C;
                const uint16_t *xr = x + (size_t(n) * H + i) * W * C;
                for (int j = 0; j < pairs; j++) {
                    interleave<C>(gr + 2 * j * C, gr + (2 * j + 1) * C,
                                  &packed_g[(size_t(i) * pairs + j) * C]);
                    interleave<C>(xr + 2 * j * C, xr + (2 * j + 1) * C,
                                  &even[(size_t(i) * pairs + j) * C]);
                    interleave<C>(j ? xr + (2 * j - 1) * C : nullptr, xr + 2 * j * C,
                                  &odd[(size_t(i) * (pairs + 1) + j) * C]);
                }
                interleave<C>(xr + (W - 1) * C, nullptr,
                              &odd[(size_t(i) * (pairs + 1) + pairs) * C]);
            }
            for (int co = 0; co < C; co += 8)
                for (int ci = 0; ci < C; ci += 16)
                    for (int ky = 0; ky < 3; ky++) {
                        __m512 acc[8][3];
#pragma GCC unroll 8
                        for (int k = 0; k < 8; k++)
#pragma GCC unroll 3
                            for (int kx = 0; kx < 3; kx++) {
                                acc[k][kx] = _mm512_loadu_ps(
                                    own + ((size_t(co + k) * 3 + ky) * 3 + kx) * C + ci);
                            }
                        int i0 = ky == 0 ? 1 : 0, i1 = ky == 2 ? H - 1 : H;
                        for (int i = i0; i < i1; i++) {
                            int from = i + ky - 1;
                            const uint32_t *gp = &packed_g[size_t(i) * pairs * C + co];
                            const uint32_t *ep = &even[size_t(from) * pairs * C + ci];
                            const uint32_t *op = &odd[size_t(from) * (pairs + 1) * C + ci];
                            for (int j = 0; j < pairs; j++) {
                                __m512bh left = pair_of(op), mid = pair_of(ep),
                                         right = pair_of(op + C);
#pragma GCC unroll 8
                                for (int k = 0; k < 8; k++) {
                                    __m512bh b = (__m512bh)_mm512_set1_epi32(int(gp[k]));
                                    acc[k][0] = _mm512_dpbf16_ps(acc[k][0], left, b);
                                    acc[k][1] = _mm512_dpbf16_ps(acc[k][1], mid, b);
                                    acc[k][2] = _mm512_dpbf16_ps(acc[k][2], right, b);
                                }
                                gp += C, ep += C, op += C;
                            }
                        }
#pragma GCC unroll 8
                        for (int k = 0; k < 8; k++)
#pragma GCC unroll 3
                            for (int kx = 0; kx < 3; kx++)
                                _mm512_storeu_ps(
                                    own + ((size_t(co + k) * 3 + ky) * 3 + kx) * C + ci,
                                    acc[k][kx]);
                    }
        }
    }
    for (int i = 0; i < size; i++) {
        float total = 0;
        for (int t = 0; t < threads; t++) total += partial[size_t(t) * size + i];
        weight_grad[i] = total;
    }
}
#endif

// The number of channels as a constant: C is 16, 32 or 64.
#define BY_CHANNELS(channels, ...)                                \
    switch (channels) {                                           \
        case 16: { constexpr int C = 16; __VA_ARGS__; break; }    \
        case 32: { constexpr int C = 32; __VA_ARGS__; break; }    \
        case 64: { constexpr int C = 64; __VA_ARGS__; break; }    \
    }

template <class T>
void apply_any(int channels, const T *x, const float *scale, const float *shift, const T *residual,
               T *out, int64_t rows, int relu, int threads) {
    BY_CHANNELS(channels, {
        if (residual && relu) apply<T, C, true, true>(x, scale, shift, residual, out, rows, threads);
        else if (relu) apply<T, C, false, true>(x, scale, shift, residual, out, rows, threads);
        else apply<T, C, false, false>(x, scale, shift, residual, out, rows, threads);
    })
}

template <class T>
void grad_statistics_any(int channels, const T *grad1, const T *grad2, const T *x, const T *out,
                         const float *mean, const float *scale, const float *shift, T *g,
                         int64_t rows, double *sums, int relu, int threads) {
#define CALL(R, S, A) \
    grad_statistics<T, C, R, S, A>(grad1, grad2, x, out, mean, scale, shift, g, rows, sums, threads)
    BY_CHANNELS(channels, {
        if (!relu) CALL(false, false, false);
        else if (out && grad2) CALL(true, true, true);
        else if (out) CALL(true, false, true);
        else if (grad2) CALL(false, true, true);
        else CALL(false, false, true);
    })
#undef CALL
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                          \
    void statistics_##NAME(int channels, const T *x, int64_t rows, double *sums, int threads) {    \
        BY_CHANNELS(channels, (statistics<T, C>(x, rows, sums, threads)))                          \
    }                                                                                              \
    void apply_##NAME(int channels, const T *x, const float *scale, const float *shift,            \
                      const T *residual, T *out, int64_t rows, int relu, int threads) {            \
        apply_any<T>(channels, x, scale, shift, residual, out, rows, relu, threads);               \
    }                                                                                              \
    void grad_statistics_##NAME(int channels, const T *grad1, const T *grad2, const T *x,          \
                                const T *out, const float *mean, const float *scale,               \
                                const float *shift, T *g, int64_t rows, double *sums, int relu,    \
                                int threads) {                                                     \
        grad_statistics_any<T>(channels, grad1, grad2, x, out, mean, scale, shift, g, rows, sums,  \
                               relu, threads);                                                     \
    }                                                                                              \
    void grad_apply_##NAME(int channels, const T *g, const T *x, const float *mean,                \
                           const float *scale, const float *shift, const float *b,                 \
                           const float *d, T *grad_x, int64_t rows, int mask, int threads) {       \
        BY_CHANNELS(channels, {                                                                    \
            if (mask) grad_apply<T, C, true>(g, x, mean, scale, shift, b, d, grad_x, rows, threads); \
            else grad_apply<T, C, false>(g, x, mean, scale, shift, b, d, grad_x, rows, threads);   \
        })                                                                                         \
    }

extern "C" {
FOR_TYPE(float, fp32)
FOR_TYPE(bf16, bf16)

int has_bf16_products() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void weight_gradient_bf16(int channels, const uint16_t *x, const uint16_t *g, float *weight_grad,
                          int images, int height, int threads) {
#ifdef __AVX512BF16__
    BY_CHANNELS(channels, (weight_gradient<C>(x, g, weight_grad, images, height, threads)))
#endif
}
}
