// CPU kernels behind kernels.py: 3x3 convolutions, BatchNorm with what surrounds it in one pass a
// direction, and the augmentation.
//
// Maps are channels-last: `rows` pixels of C numbers one after the other, C in {16, 32, 64}. Sums
// are fp32 within a chunk of 128 pixels, float64 across chunks. Work is cut into shards of so many
// images, whose results are added up in their order: the same bits for any number of threads.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// The number of channels as a constant: C is 16, 32 or 64.
#define BY_CHANNELS(channels, ...)                                \
    switch (channels) {                                           \
        case 16: { constexpr int C_ = 16; __VA_ARGS__; break; }    \
        case 32: { constexpr int C_ = 32; __VA_ARGS__; break; }    \
        case 64: { constexpr int C_ = 64; __VA_ARGS__; break; }    \
    }

namespace {

struct bf16 { uint16_t bits; };

typedef float Floats __attribute__((vector_size(64)));  // 16 channels of a pixel
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Floats load(const float *p) {
    Floats result;
    memcpy(&result, p, sizeof result);
    return result;
}
inline Floats load(const bf16 *p) {
    Halves halves;
    memcpy(&halves, p, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}
inline float wide(uint32_t bits) {  // a bf16 in the upper half
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
inline void store(Floats x, float *p) { memcpy(p, &x, sizeof x); }
inline void store(Floats x, bf16 *p) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    Halves halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
    memcpy(p, &halves, sizeof halves);
}

// Channels of a pixel, 16 at a time; an array of them may stay in registers.
template <int C>
struct Pixel {
    Floats part[C / 16];
    Pixel() = default;
    template <class T>
    explicit Pixel(const T *p) {
        for (int v = 0; v < C / 16; v++) part[v] = load(p + 16 * v);
    }
};

constexpr int64_t CHUNK = 128;  // pixels that are summed in fp32

// Add to total[0:C] the sum of x, to total[C:2C] that of its square, over up to CHUNK pixels.
// Deviations from one of them first: no cancellation.
template <class T, int C>
void add_statistics(const T *x, int64_t rows, double *total) {
    constexpr int V = C / 16, LANES = 128 / C;  // sums side by side hide the latency
    Floats sum[LANES][V] = {}, squares[LANES][V] = {};
    const Pixel<C> origin(x);
    auto add = [&](int64_t r, int lane) {
        for (int v = 0; v < V; v++) {
            Floats d = load(x + r * C + 16 * v) - origin.part[v];
            sum[lane][v] += d;
            squares[lane][v] += d * d;
        }
    };
    int64_t r = 0;
    for (; r + LANES <= rows; r += LANES)
#pragma GCC unroll 8
        for (int lane = 0; lane < LANES; lane++) add(r + lane, lane);
    for (; r < rows; r++) add(r, 0);
    for (int c = 0; c < C; c++) {
        double n = double(rows), o = origin.part[c / 16][c % 16], s = 0, q = 0;
        for (int lane = 0; lane < LANES; lane++) {
            s += sum[lane][c / 16][c % 16];
            q += squares[lane][c / 16][c % 16];
        }
        total[c] += s + n * o;
        total[C + c] += q + 2 * o * s + n * o * o;
    }
}

// A layer: relu(BatchNorm(convolution(x)) + residual); what kernels.py fills in.
//
// This process has `images` of the global batch, from the place `first` on; they are normalised in
// groups of `group_size` places. Maps are (images, pixels, channels).
struct Layer {
    int ci, co, stride, size;  // of the convolution; size: height and width of x
    int images, first, groups, group_size;
    int pixels, width;                   // of an image of y; width: pixels of a row
    int convolves;                       // y is computed here, and grad_x is that of x
    int residual_stride, grad2_stride;   // 2: through option A's shortcut
    double eps, momentum;
    const float *weight, *bn_weight, *bn_bias;  // weight [co][ky][kx][ci]
    float *running_mean, *running_var;
    int64_t *num_batches_tracked;
    const void *x, *residual;
    void *y, *out;
    float *affine;                                  // [mean, scale, shift][group][co]
    double *sums, *invstd, *grad_sums;              // [2][group][co], [group][co], [2][group][co]
    const void *grad1, *grad2;                      // of the output, from one consumer or two
    void *masked, *grad_x;                          // grad1 + grad2 where ReLU let through
    float *weight_grad, *bn_weight_grad, *bn_bias_grad;

    template <class T> T *map(const void *start, int64_t image, int64_t size) const {
        return start ? (T *)start + image * size : nullptr;
    }
    int64_t y_size() const { return int64_t(pixels) * co; }  // of an image
    int64_t x_size() const { return int64_t(size) * size * ci; }
};

// Have an image's map brought near while the one before it is computed with.
template <class T>
void prefetch(const Layer &layer, const void *map, int image, int64_t size) {
    if (image >= layer.images) return;
    const char *at = (const char *)layer.map<T>(map, image, size);
    for (int64_t i = 0; i < size * int64_t(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 2);
}

// The images of a group that are this process's.
struct Piece {
    int group, first, count;  // first: among this process's
};

std::vector<Piece> pieces(const Layer &layer) {
    std::vector<Piece> found;
    for (int g = 0; g < layer.groups; g++) {
        int start = std::max(0, g * layer.group_size - layer.first);
        int stop = std::min(layer.images, (g + 1) * layer.group_size - layer.first);
        if (start < stop) found.push_back({g, start, stop - start});
    }
    return found;
}

// Add up totals [..][2][C], in their order, into sums[0] and sums[1], a group's stride apart.
void add_up(const std::vector<double> &totals, int C, double *sums, size_t stride) {
    for (size_t k = 0; k < 2; k++)
        for (int c = 0; c < C; c++) {
            sums[k * stride + c] = 0;
            for (size_t i = k * C + c; i < totals.size(); i += 2 * C)
                sums[k * stride + c] += totals[i];
        }
}

// Call work(first, count, total) for shards of `at_once` images, and add up the totals [2][C]. Which
// thread takes which shard is left to chance, and does not show.
template <int C, class Work>
void over_shards(const Piece &piece, int at_once, int threads, double *sums, size_t stride,
                 Work work) {
    const int shards = (piece.count + at_once - 1) / at_once;
    std::vector<double> partial(size_t(shards) * 2 * C, 0.0);
#pragma omp parallel num_threads(threads)
    {
        auto of_thread = work();
#pragma omp for schedule(dynamic, 1)
        for (int s = 0; s < shards; s++)
            of_thread(piece.first + s * at_once, std::min(at_once, piece.count - s * at_once),
                      &partial[size_t(s) * 2 * C]);
    }
    add_up(partial, C, sums, stride);
}

// The same over all of image n of y.
template <class T, int C>
void add_statistics_of(const Layer &layer, int n, double *total) {
    const T *y = layer.map<T>(layer.y, n, layer.y_size());
    for (int64_t r = 0; r < layer.pixels; r += CHUNK)
        add_statistics<T, C>(y + r * C, std::min(CHUNK, layer.pixels - r), total);
}

// The sums of y and of its square over a piece.
template <class T, int C>
void statistics(const Layer &layer, const Piece &piece, int threads) {
    size_t stride = size_t(layer.groups) * C;
    over_shards<C>(piece, 1, threads, layer.sums + piece.group * C, stride, [&] {
        return [&](int n, int, double *total) { add_statistics_of<T, C>(layer, n, total); };
    });
}

// From the sums over all processes to what the rest needs of them, and the running statistics.
void finish_statistics(const Layer &layer) {
    ++*layer.num_batches_tracked;
    const int C = layer.co, G = layer.groups;
    const double count = double(layer.group_size) * layer.pixels;
    for (int c = 0; c < C; c++) {
        double all_means = 0, all_vars = 0;
        for (int g = 0; g < G; g++) {
            const int i = g * C + c;
            double mean = layer.sums[i] / count;
            double var = layer.sums[G * C + i] / count - mean * mean;
            if (var < 0) var = 0;  // NaN stays
            double inverse = 1 / sqrt(var + layer.eps), scale = layer.bn_weight[c] * inverse;
            layer.affine[i] = float(mean);
            layer.affine[G * C + i] = float(scale);
            layer.affine[2 * G * C + i] = float(layer.bn_bias[c] - mean * scale);
            layer.invstd[i] = inverse;
            all_means += mean;
            all_vars += var * count / (count - 1);
        }
        double mean = layer.running_mean[c], var = layer.running_var[c];
        layer.running_mean[c] = float(mean + layer.momentum * (all_means / G - mean));
        layer.running_var[c] = float(var + layer.momentum * (all_vars / G - var));
    }
}

// A group's mean, scale and shift.
template <int C>
struct Affine {
    Pixel<C> mean, scale, shift;
    Affine(const Layer &layer, int group)
        : mean(layer.affine + group * C),
          scale(layer.affine + (layer.groups + group) * C),
          shift(layer.affine + (2 * layer.groups + group) * C) {}
};

// What is added to 16 channels of pixel r. With STRIDE 2 (option A) the residual has half the
// channels and four times the pixels: every second one is taken, and zeros beyond its channels.
template <class T, int C, int STRIDE>
Floats residual_at(const T *residual, int width, int64_t r, int v) {
    if (STRIDE == 0 || (STRIDE == 2 && v >= C / 32)) return Floats{};
    if (STRIDE == 1) return load(residual + r * C + 16 * v);
    return load(residual + (r / width * 4 * width + r % width * 2) * (C / 2) + 16 * v);
}

// What comes back through such a shortcut to 16 channels of pixel r, from a gradient of twice the
// channels and a quarter of the pixels.
template <class T, int C, int STRIDE>
Floats second_at(const T *grad2, int width, int64_t r, int v) {
    if (STRIDE == 0) return Floats{};
    if (STRIDE == 1) return load(grad2 + r * C + 16 * v);
    const int64_t i = r / width, j = r % width;
    if (i % 2 || j % 2) return Floats{};
    return load(grad2 + (i / 2 * (width / 2) + j / 2) * 2 * C + 16 * v);
}

// out = relu(scale * y + shift + residual), of image n.
template <class T, int C, int RESIDUAL>
void write_out(const Layer &layer, int group, int n) {
    const Affine<C> affine(layer, group);
    const Pixel<C> a = affine.scale, b = affine.shift;
    const int64_t size = layer.y_size();
    const T *y = layer.map<T>(layer.y, n, size);
    const T *residual = layer.map<T>(layer.residual, n, size * std::max(1, RESIDUAL));
    T *out = layer.map<T>(layer.out, n, size);
    for (int64_t r = 0; r < layer.pixels; r++)
        for (int v = 0; v < C / 16; v++) {
            int64_t i = r * C + 16 * v;
            Floats result = load(y + i) * a.part[v] + b.part[v];
            if (RESIDUAL) result += residual_at<T, C, RESIDUAL>(residual, layer.width, r, v);
            store(result < 0 ? Floats{} : result, out + i);  // NaN stays
        }
}

using WriteOut = void (*)(const Layer &layer, int group, int n);

template <class T>
WriteOut write_out_of(const Layer &layer) {
    BY_CHANNELS(layer.co, {
        if (!layer.residual) return write_out<T, C_, 0>;
        return layer.residual_stride == 1 ? write_out<T, C_, 1> : write_out<T, C_, 2>;
    })
    return nullptr;
}

// g = (grad1 + grad2) where the output was positive, of image n. To total[0:C] the sum of g is added,
// to total[C:2C] that of g * (y - mean). With a residual the output is looked at, without one it is
// found again; g is written down unless it is grad1 where the output was positive, and no more.
template <class T, int C, bool HAS_RESIDUAL, int SECOND>
void add_grad_statistics(const Layer &layer, int group, int n, double *total) {
    const Affine<C> affine(layer, group);
    const Pixel<C> m = affine.mean, a = affine.scale, b = affine.shift;
    const int64_t size = layer.y_size();
    const T *grad1 = layer.map<T>(layer.grad1, n, size);
    const T *grad2 = layer.map<T>(layer.grad2, n, size / std::max(1, SECOND));
    const T *y = layer.map<T>(layer.y, n, size), *out = layer.map<T>(layer.out, n, size);
    T *masked = layer.map<T>(layer.masked, n, size);
    for (int64_t start = 0; start < layer.pixels; start += CHUNK) {
        Floats sum[C / 16] = {}, dot[C / 16] = {};
        const int64_t stop = std::min<int64_t>(layer.pixels, start + CHUNK);
#pragma GCC unroll 2
        for (int64_t r = start; r < stop; r++)
            for (int v = 0; v < C / 16; v++) {
                int64_t i = r * C + 16 * v;
                Floats g = load(grad1 + i), from = load(y + i);
                if (SECOND) g += second_at<T, C, SECOND>(grad2, layer.width, r, v);
                Floats o = HAS_RESIDUAL ? load(out + i) : from * a.part[v] + b.part[v];
                g = o > 0 ? g : Floats{};
                if (HAS_RESIDUAL || SECOND) store(g, masked + i);
                sum[v] += g;
                dot[v] += g * (from - m.part[v]);
            }
        for (int c = 0; c < C; c++) {
            total[c] += sum[c / 16][c % 16];
            total[C + c] += dot[c / 16][c % 16];
        }
    }
}

using AddGradStatistics = void (*)(const Layer &layer, int group, int n, double *total);

template <class T, int C, bool HAS_RESIDUAL>
AddGradStatistics add_grad_statistics_of(const Layer &layer) {
    if (!layer.grad2) return add_grad_statistics<T, C, HAS_RESIDUAL, 0>;
    return layer.grad2_stride == 1 ? add_grad_statistics<T, C, HAS_RESIDUAL, 1>
                                   : add_grad_statistics<T, C, HAS_RESIDUAL, 2>;
}

template <class T>
AddGradStatistics add_grad_statistics_of(const Layer &layer) {
    BY_CHANNELS(layer.co, {
        return layer.residual ? add_grad_statistics_of<T, C_, true>(layer)
                              : add_grad_statistics_of<T, C_, false>(layer);
    })
    return nullptr;
}

// This process's gradients of BatchNorm's weight and bias, from its own sums.
void parameter_gradients(const Layer &layer) {
    const int C = layer.co, G = layer.groups;
    for (int c = 0; c < C; c++) {
        double of_weight = 0, of_bias = 0;
        for (int i = c; i < G * C; i += C) {
            of_bias += layer.grad_sums[i];
            of_weight += layer.grad_sums[G * C + i] * layer.invstd[i];
        }
        layer.bn_weight_grad[c] = float(of_weight);
        layer.bn_bias_grad[c] = float(of_bias);
    }
}

// The gradient of y: scale * (g - b - (y - mean) * d), where b and d are the means over the group of
// g and of g * (y - mean) / variance. MASK: g was not written down, and has yet to be masked.
template <class T, int C, bool MASK>
struct Gradient {
    const Layer &layer;
    Affine<C> affine;
    Pixel<C> b, d;

    Gradient(const Layer &layer, int group) : layer(layer), affine(layer, group) {
        const double count = double(layer.group_size) * layer.pixels;
        for (int c = 0; c < C; c++) {
            int i = group * C + c;
            double invstd = layer.invstd[i], dot = layer.grad_sums[layer.groups * C + i];
            b.part[c / 16][c % 16] = float(layer.grad_sums[i] / count);
            d.part[c / 16][c % 16] = float(dot / count * invstd * invstd);
        }
    }

    const void *of() const { return MASK ? layer.grad1 : layer.masked; }

    // Write that of an image's pixels start..stop-1 to out.
    void write(int64_t image, int64_t start, int64_t stop, T *out) const {
        const T *y = layer.map<T>(layer.y, image, layer.y_size()) + start * C;
        const T *g = layer.map<T>(of(), image, layer.y_size()) + start * C;
        for (int64_t r = 0; r < stop - start; r++)
            for (int v = 0; v < C / 16; v++) {
                int64_t i = r * C + 16 * v;
                Floats from = load(y + i), value = load(g + i), scale = affine.scale.part[v];
                if (MASK) value = from * scale + affine.shift.part[v] > 0 ? value : Floats{};
                value = value - b.part[v] - (from - affine.mean.part[v]) * d.part[v];
                store(scale * value, out + i);
            }
    }
};

template <class T, int C, bool MASK>
void grad_apply(const Layer &layer, const Piece &piece, int threads) {
    const Gradient<T, C, MASK> gradient(layer, piece.group);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int n = piece.first; n < piece.first + piece.count; n++)
        gradient.write(n, 0, layer.pixels, layer.map<T>(layer.grad_x, n, layer.y_size()));
}

// ---- Convolutions, 3x3 with a border of zeros, an image at a time.
//
// A unit is the four bytes that one multiplication takes: two neighbouring channels in bf16, or one
// number in fp32. Weights are laid out anew as [tap][unit of one side's channels][the other side's],
// so that 16 outputs are added to at once, from one unit of the map that all of them share.

typedef uint32_t Unit;
template <class T> constexpr int PER_UNIT = sizeof(Unit) / sizeof(T);

template <class T> Floats multiply_add(Floats sum, Floats weights, Unit x);
template <>
inline Floats multiply_add<float>(Floats sum, Floats weights, Unit x) {
    float number;
    memcpy(&number, &x, sizeof number);
    return sum + weights * number;
}
template <>
inline Floats multiply_add<bf16>(Floats sum, Floats weights, Unit x) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights,
                                    (__m512bh)_mm512_set1_epi32(int(x)));
#else
    Words w = (Words)weights;
    sum += (Floats)(w << 16) * wide(x << 16);
    return sum + (Floats)(w & 0xffff0000u) * wide(x & 0xffff0000u);
#endif
}

// Memory that a thread keeps, on the boundaries of cache lines.
template <class T>
struct Buffer {
    std::vector<char> bytes;
    T *of(size_t size) {
        if (bytes.size() < size * sizeof(T) + 64) bytes.resize(size * sizeof(T) + 64);
        return (T *)((uintptr_t(bytes.data()) + 63) & ~uintptr_t(63));
    }
};

// A map of one image in a border of zeros.
template <class T>
struct Padded {
    int size, channels;  // of the map without its border; size is height and width
    T *at;

    Padded(Buffer<T> &buffer, int size, int channels) : size(size), channels(channels) {
        size_t numbers = size_t(size + 2) * (size + 2) * channels;
        at = buffer.of(numbers);
        memset((void *)at, 0, numbers * sizeof(T));
    }
    T *row(int i) { return at + (size_t(i + 1) * (size + 2) + 1) * channels; }
    void fill(const T *map) {
        for (int i = 0; i < size; i++)
            memcpy((void *)row(i), map + size_t(i) * size * channels,
                   size_t(size) * channels * sizeof(T));
    }
    int units() const { return channels / PER_UNIT<T>; }  // a pixel's
    const Unit *unit(int i, int j) const {                // of the pixel i, j, border included
        return (const Unit *)at + (size_t(i) * (size + 2) + j) * units();
    }
};

// Two numbers a unit, channel by channel: a's and b's.
inline Words interleave(Floats a, Floats b) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    __m512bh halves = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (Words)_mm512_permutexvar_epi16(order, (__m512i)halves);
#else
    auto rounded = [](Words bits) { return bits + 0x7fff + ((bits >> 16) & 1); };
    return rounded((Words)a) >> 16 | (rounded((Words)b) & 0xffff0000u);
#endif
}

// Two rows of 16 channels as units: bf16 share them, fp32 lie a step apart.
inline void write_units(Floats first, Floats second, float, size_t step, Unit *to) {
    memcpy(to, &first, sizeof first);
    memcpy(to + step, &second, sizeof second);
}
inline void write_units(Floats first, Floats second, bf16, size_t, Unit *to) {
    Words both = interleave(first, second);
    memcpy(to, &both, sizeof both);
}

// From weights [co][ky][kx][ci] to [ky][kx][unit of ci][co].
template <class T>
std::vector<Unit> pack_weights(const float *weights, int ci, int co) {
    constexpr int COUNT = 16 / PER_UNIT<T>;
    std::vector<Unit> packed(size_t(9) * ci / PER_UNIT<T> * co);
    for (int o = 0; o < co; o++)
        for (int i = 0; i < 9 * ci; i += 16, weights += 16) {
            Unit units[COUNT];
            store(load(weights), (T *)units);
            for (int u = 0; u < COUNT; u++)
                packed[size_t(i / PER_UNIT<T> + u) * co + o] = units[u];
        }
    return packed;
}

// For the gradient of x: to [ky][kx][unit of co][ci].
template <class T>
std::vector<Unit> pack_weights_back(const float *weights, int ci, int co) {
    const size_t tap = size_t(co) / PER_UNIT<T> * ci;
    std::vector<Unit> packed(9 * tap);
    for (int o = 0; o < co; o += 2)
        for (int i = 0; i < 9 * ci; i += 16) {
            const float *first = weights + size_t(o) * 9 * ci + i;
            write_units(load(first), load(first + 9 * ci), T(), ci,
                        &packed[i / ci * tap + size_t(o) / PER_UNIT<T> * ci + i % ci]);
        }
    return packed;
}

struct Tap {
    const Unit *pixels;   // what it reads for the first output
    const Unit *weights;  // [unit][output channel]
};

// A sum of taps: rows x width outputs, their places and those read being so many units apart.
struct Taps {
    Tap tap[9];
    int count, channels;  // channels of the output
    int rows, width;
    size_t row_step;                // in units read
    size_t out_row_step, out_step;  // in numbers written
};

// PIXELS outputs of a row times PARTS times 16 channels stay in registers. UNITS are read of each
// pixel, every STRIDE-th: constants, for the addresses to be part of the instructions.
template <class T, int UNITS, int STRIDE, int PIXELS, int PARTS>
void add_taps(const Taps &taps, T *out) {
    for (int c = 0; c < taps.channels; c += 16 * PARTS)
        for (int i = 0; i < taps.rows; i++)
            for (int j = 0; j < taps.width; j += PIXELS) {
                Floats sums[PIXELS][PARTS] = {};
                for (int t = 0; t < taps.count; t++) {
                    const Unit *x = taps.tap[t].pixels + i * taps.row_step + j * UNITS * STRIDE;
                    const Unit *w = taps.tap[t].weights + c;
                    for (int u = 0; u < UNITS; u++, w += taps.channels) {
                        Floats weights[PARTS];
                        for (int v = 0; v < PARTS; v++) memcpy(&weights[v], w + 16 * v, 64);
#pragma GCC unroll 16
                        for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 2
                            for (int v = 0; v < PARTS; v++)
                                sums[p][v] = multiply_add<T>(sums[p][v], weights[v],
                                                             x[p * UNITS * STRIDE + u]);
                    }
                }
                T *at = out + i * taps.out_row_step + j * taps.out_step + c;
                for (int p = 0; p < PIXELS; p++)
                    for (int v = 0; v < PARTS; v++)
                        store(sums[p][v], at + p * taps.out_step + 16 * v);
            }
}

template <class T, int UNITS, int STRIDE>
void add_taps(const Taps &taps, T *out) {
    if (taps.width % 16 == 0) add_taps<T, UNITS, STRIDE, 16, 1>(taps, out);
    else if (taps.channels % 32 == 0) add_taps<T, UNITS, STRIDE, 8, 2>(taps, out);
    else add_taps<T, UNITS, STRIDE, 8, 1>(taps, out);
}

// out[i, j] = sum over ky, kx of weights[ky, kx] x[S i + ky - 1, S j + kx - 1].
template <class T, int UNITS, int STRIDE>
void convolve(const Padded<T> &x, const std::vector<Unit> &weights, int co, T *out) {
    int size = x.size / STRIDE;
    Taps taps{{}, 0, co, size, size, size_t(x.unit(STRIDE, 0) - x.unit(0, 0)),
              size_t(size) * co, size_t(co)};
    for (int ky = 0; ky < 3; ky++)
        for (int kx = 0; kx < 3; kx++)
            taps.tap[taps.count++] = {x.unit(ky, kx), &weights[size_t(3 * ky + kx) * UNITS * co]};
    add_taps<T, UNITS, STRIDE>(taps, out);
}

// The gradient of what `convolve` read: x[S i + y, ..] was read by g[i + dy, ..], where
// dy = (y + 1 - ky) / S for those ky for which that is whole. S * S sets of pixels, each its taps.
template <class T, int UNITS>
void convolve_back(const Padded<T> &g, const std::vector<Unit> &weights, int ci, int stride,
                   T *out) {
    int size = g.size * stride;
    for (int y = 0; y < stride; y++)
        for (int x = 0; x < stride; x++) {
            Taps taps{{}, 0, ci, g.size, g.size, size_t(g.unit(1, 0) - g.unit(0, 0)),
                      size_t(stride) * size * ci, size_t(stride) * ci};
            for (int ky = 0; ky < 3; ky++)
                for (int kx = 0; kx < 3; kx++) {
                    int dy = y + 1 - ky, dx = x + 1 - kx;
                    if (dy % stride || dx % stride) continue;
                    taps.tap[taps.count++] = {g.unit(1 + dy / stride, 1 + dx / stride),
                                              &weights[size_t(3 * ky + kx) * UNITS * ci]};
                }
            add_taps<T, UNITS, 1>(taps, out + (size_t(y) * size + x) * ci);
        }
}

// Winograd's F(2x2, 3x3) (Lavin and Gray 2016), for stride 1: 16 multiplications for four outputs
// that take 36 otherwise. Of each tile of 4x4 pixels, which overlap by two, and of the weights 16
// combinations are taken; of each of these a matrix product over the channels is left. TILES are
// worked on at once, in pairs that lie side by side.
constexpr int COMBINATIONS = 16;
constexpr int TILES = 16;

// Combinations of a map as products over channels read them: [combination][tile][unit of channels].
// Their distance is no power of two, or they would compete for places in the cache.
template <class T, int C>
struct ByChannel {
    static constexpr int UNITS = C / PER_UNIT<T>;
    static constexpr size_t COMBINATION = TILES * UNITS + 16, SIZE = COMBINATIONS * COMBINATION;
    Unit *at;
    void write(int combination, int tile, int c, Floats first, Floats second) {
        T *to = (T *)(at + combination * COMBINATION + tile * UNITS) + c;
        store(first, to);
        store(second, to + C);
    }
};

// As products over tiles read them: [combination][unit of tiles][channel].
template <class T, int C>
struct ByTile {
    static constexpr int UNITS = TILES / PER_UNIT<T>;
    static constexpr size_t COMBINATION = UNITS * C + 16, SIZE = COMBINATIONS * COMBINATION;
    Unit *at;
    void write(int combination, int tile, int c, Floats first, Floats second) {
        write_units(first, second, T(), C,
                    at + combination * COMBINATION + tile / PER_UNIT<T> * C + c);
    }
};

// Where the outputs of a tile lie.
struct Place {
    int i, j;
    Place(int tile, int size) : i(tile / (size / 2) * 2), j(tile % (size / 2) * 2) {}
};

// B' d B, of the pixels d that the outputs of TILES tiles read.
template <class T, int C, class Combined>
void combine_inputs(const Padded<T> &x, int first, Combined combined) {
    const size_t row = size_t(x.size + 2) * C;
    for (int t = 0; t < TILES; t += 2) {
        const Place place(first + t, x.size);
        for (int c = 0; c < C; c += 16) {
            const T *from = x.at + place.i * row + place.j * C + c;
            Floats d[4][6];
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++, from += C) {
                Floats d0 = load(from), d1 = load(from + row);
                Floats d2 = load(from + 2 * row), d3 = load(from + 3 * row);
                d[0][j] = d0 - d2, d[1][j] = d1 + d2, d[2][j] = d2 - d1, d[3][j] = d1 - d3;
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Floats *e = d[i];
                combined.write(4 * i, t, c, e[0] - e[2], e[2] - e[4]);
                combined.write(4 * i + 1, t, c, e[1] + e[2], e[3] + e[4]);
                combined.write(4 * i + 2, t, c, e[2] - e[1], e[4] - e[3]);
                combined.write(4 * i + 3, t, c, e[1] - e[3], e[3] - e[5]);
            }
        }
    }
}

// A g A', of the gradients g of TILES tiles.
template <class T, int C, class Combined>
void combine_gradients(Padded<T> &g, int first, Combined combined) {
    for (int t = 0; t < TILES; t += 2) {
        const Place place(first + t, g.size);
        for (int c = 0; c < C; c += 16) {
            const T *upper = g.row(place.i) + place.j * C + c;
            const T *lower = g.row(place.i + 1) + place.j * C + c;
            Floats d[4][4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                Floats d0 = load(upper + j * C), d1 = load(lower + j * C);
                d[0][j] = d0, d[1][j] = d0 + d1, d[2][j] = d0 - d1, d[3][j] = -d1;
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Floats *e = d[i];
                combined.write(4 * i, t, c, e[0], e[2]);
                combined.write(4 * i + 1, t, c, e[0] + e[1], e[2] + e[3]);
                combined.write(4 * i + 2, t, c, e[0] - e[1], e[2] - e[3]);
                combined.write(4 * i + 3, t, c, -e[1], -e[3]);
            }
        }
    }
}

// A' m A: 16 channels of a tile's outputs, from products m that lie TILES apart.
template <class T>
void write_outputs(const Floats *m, size_t row, size_t pixel, T *out) {
    Floats upper[4], lower[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, m += TILES) {
        Floats m0 = m[0], m1 = m[4 * TILES], m2 = m[8 * TILES], m3 = m[12 * TILES];
        upper[j] = m0 + m1 + m2;
        lower[j] = m1 - m2 - m3;
    }
    store(upper[0] + upper[1] + upper[2], out);
    store(upper[1] - upper[2] - upper[3], out + pixel);
    store(lower[0] + lower[1] + lower[2], out + row);
    store(lower[1] - lower[2] - lower[3], out + row + pixel);
}

// The rows of G, times three numbers.
inline void combine(const Floats *w, size_t step, Floats *to, size_t to_step) {
    Floats outer = (w[0] + w[2 * step]) * 0.5f, inner = w[step] * 0.5f;
    to[0] = w[0];
    to[to_step] = outer + inner;
    to[2 * to_step] = outer - inner;
    to[3 * to_step] = w[2 * step];
}

// G w G', of the weights w [co][ky][kx][ci] turned by half a circle, as [combination][unit of co][ci].
template <class T>
std::vector<Unit> combine_weights(const float *weights, int ci, int co) {
    const size_t combination = size_t(co) / PER_UNIT<T> * ci;
    std::vector<Unit> packed(COMBINATIONS * combination);
    for (int o = 0; o < co; o += 2)
        for (int c = 0; c < ci; c += 16) {
            Floats combined[2][COMBINATIONS];
            for (int second = 0; second < 2; second++) {
                Floats tap[9], rows[12];
                for (int k = 0; k < 9; k++)
                    tap[k] = load(weights + (size_t(o + second) * 9 + 8 - k) * ci + c);
                for (int kx = 0; kx < 3; kx++) combine(tap + kx, 3, rows + kx, 3);
                for (int i = 0; i < 4; i++) combine(rows + 3 * i, 1, combined[second] + 4 * i, 1);
            }
            Unit *to = &packed[size_t(o) / PER_UNIT<T> * ci + c];
            for (int k = 0; k < COMBINATIONS; k++, to += combination)
                write_units(combined[0][k], combined[1][k], T(), ci, to);
        }
    return packed;
}

// What `convolve` computes with stride 1, and `convolve_back` with the weights for that.
template <class T, int C>
void winograd(const Padded<T> &x, const std::vector<Unit> &weights, int co, T *out) {
    using Combined = ByChannel<T, C>;
    alignas(64) Unit inputs[Combined::SIZE];
    Floats outputs[COMBINATIONS][TILES];
    for (int first = 0; first < x.size * x.size / 4; first += TILES) {
        combine_inputs<T, C>(x, first, Combined{inputs});
        for (int c = 0; c < co; c += 16) {
            const Unit *w = &weights[c];
            for (int k = 0; k < COMBINATIONS; k++) {
                const Unit *in = inputs + k * Combined::COMBINATION;
                Floats sums[TILES] = {};
                for (int u = 0; u < Combined::UNITS; u++, w += co) {
                    Floats lanes;
                    memcpy(&lanes, w, sizeof lanes);
#pragma GCC unroll 16
                    for (int t = 0; t < TILES; t++)
                        sums[t] = multiply_add<T>(sums[t], lanes, in[t * Combined::UNITS + u]);
                }
#pragma GCC unroll 16
                for (int t = 0; t < TILES; t++) outputs[k][t] = sums[t];
            }
            for (int t = 0; t < TILES; t++) {
                const Place place(first + t, x.size);
                write_outputs(&outputs[0][t], size_t(x.size) * co, co,
                              out + (size_t(place.i) * x.size + place.j) * co + c);
            }
        }
    }
}

// sums[combination][co][ci] += sum over tiles of the combinations of g times those of x. STRIPS
// times TILES are added up before they are stored.
constexpr int STRIPS = 4;

template <class T, int CI, int CO>
void add_combined_gradient(const Padded<T> *x, Padded<T> *g, int images, Buffer<Unit> *buffers,
                           float *sums) {
    using X = ByTile<T, CI>;
    using G = ByTile<T, CO>;
    Unit *inputs = buffers[0].of(STRIPS * X::SIZE), *grads = buffers[1].of(STRIPS * G::SIZE);
    const int of_image = x->size * x->size / 4 / TILES;
    for (int start = 0; start < images * of_image; start += STRIPS) {
        const int strips = std::min(STRIPS, images * of_image - start);
        for (int s = 0; s < strips; s++) {
            const int n = (start + s) / of_image, first = (start + s) % of_image * TILES;
            combine_inputs<T, CI>(x[n], first, X{inputs + s * X::SIZE});
            combine_gradients<T, CO>(g[n], first, G{grads + s * G::SIZE});
        }
        for (int k = 0; k < COMBINATIONS; k++)
            for (int o = 0; o < CO; o += 16)
                for (int c = 0; c < CI; c += 16) {
                    float *to = sums + (size_t(k) * CO + o) * CI + c;
                    Floats total[16];
#pragma GCC unroll 16
                    for (int v = 0; v < 16; v++) total[v] = load(to + v * CI);
                    for (int s = 0; s < strips; s++) {
                        const Unit *xs = inputs + s * X::SIZE + k * X::COMBINATION + c;
                        const Unit *gs = grads + s * G::SIZE + k * G::COMBINATION + o;
                        for (int u = 0; u < X::UNITS; u++) {
                            Floats lanes;
                            memcpy(&lanes, xs + u * CI, sizeof lanes);
#pragma GCC unroll 16
                            for (int v = 0; v < 16; v++)
                                total[v] = multiply_add<T>(total[v], lanes, gs[u * CO + v]);
                        }
                    }
#pragma GCC unroll 16
                    for (int v = 0; v < 16; v++) store(total[v], to + v * CI);
                }
    }
}

// The columns of G, times four times 16 channels.
inline void separate(const Floats *s, size_t step, Floats *to) {
    Floats outer = (s[step] + s[2 * step]) * 0.5f;
    to[0] = s[0] + outer;
    to[1] = (s[step] - s[2 * step]) * 0.5f;
    to[2] = outer + s[3 * step];
}

// weight_grad[co][ky][kx][ci] = G' s G, of the sums s of `add_combined_gradient`.
inline void separate_weight_gradient(const float *sums, int ci, int co, float *weight_grad) {
    for (int o = 0; o < co; o++)
        for (int c = 0; c < ci; c += 16) {
            Floats s[COMBINATIONS], columns[4][3], row[3];
            for (int k = 0; k < COMBINATIONS; k++)
                s[k] = load(sums + (size_t(k) * co + o) * ci + c);
            for (int j = 0; j < 4; j++) separate(s + j, 4, columns[j]);
            for (int ky = 0; ky < 3; ky++) {
                separate(&columns[0][ky], 3, row);
                for (int kx = 0; kx < 3; kx++)
                    store(row[kx], weight_grad + (size_t(o) * 9 + 3 * ky + kx) * ci + c);
            }
        }
}

// Maps as the weight's gradient reads them: a step takes one pixel in fp32, two in bf16, which lie
// channel by channel beside each other in a unit.
struct Steps {
    const Unit *at;
    size_t row_step, step;
};

inline void pair(const bf16 *a, const bf16 *b, int channels, Unit *out) {
    for (int c = 0; c < channels; c += 16) {
        Halves first, second;
        memcpy(&first, a + c, sizeof first);
        memcpy(&second, b + c, sizeof second);
        Words both = __builtin_convertvector(first, Words) |
                     (__builtin_convertvector(second, Words) << 16);
        memcpy(out + c, &both, sizeof both);
    }
}

// The pixels that the three taps of a row read: x[.., S j + kx].
inline void steps_of(const Padded<float> &x, int stride, Buffer<Unit> *, Steps *steps) {
    for (int kx = 0; kx < 3; kx++)
        steps[kx] = {x.unit(0, kx), size_t(x.unit(1, 0) - x.unit(0, 0)),
                     size_t(x.units()) * stride};
}
inline void steps_of(const Padded<bf16> &x, int stride, Buffer<Unit> *buffers, Steps *steps) {
    int C = x.channels, pairs = x.size / stride / 2, rows = x.size + 2;
    for (int kx = 0; kx < 3; kx++) {
        if (stride == 1 && kx == 2) {  // those of the first tap, one step on
            steps[2] = {steps[0].at + C, steps[0].row_step, size_t(C)};
            continue;
        }
        int per_row = pairs + (stride == 1 && kx == 0);
        Unit *packed = buffers[kx].of(size_t(rows) * per_row * C);
        steps[kx] = {packed, size_t(per_row) * C, size_t(C)};
        for (int i = 0; i < rows; i++) {
            const bf16 *from = x.at + (size_t(i) * (x.size + 2) + kx) * C;
            for (int j = 0; j < per_row; j++, packed += C)
                pair(from + 2 * j * stride * C, from + (2 * j + 1) * stride * C, C, packed);
        }
    }
}
inline Steps steps_of(const Padded<float> &g, Buffer<Unit> &) {
    return {g.unit(1, 1), size_t(g.unit(1, 0) - g.unit(0, 0)), size_t(g.units())};
}
inline Steps steps_of(Padded<bf16> &g, Buffer<Unit> &buffer) {
    int C = g.channels, pairs = g.size / 2;
    Unit *packed = buffer.of(size_t(g.size) * pairs * C);
    Steps steps{packed, size_t(pairs) * C, size_t(C)};
    for (int i = 0; i < g.size; i++)
        for (int j = 0; j < pairs; j++, packed += C)
            pair(g.row(i) + 2 * j * C, g.row(i) + (2 * j + 1) * C, C, packed);
    return steps;
}

// weight_grad[co][ky][kx][ci] += sum over images, i, j of g[i, j, co] * x[S i + ky, S j + kx, ci].
// 8 output channels times 3 taps times 16 input channels stay in registers.
template <class T>
void add_weight_gradient(const Steps (*x)[3], const Steps *g, int images, int ci, int co, int stride,
                         int size, bool from_zero, float *weight_grad) {
    constexpr int COS = 8;
    const int count = size / PER_UNIT<T>;
    for (int o = 0; o < co; o += COS)
        for (int ky = 0; ky < 3; ky++)
            for (int c = 0; c < ci; c += 16) {
                Floats sums[COS][3] = {};
                float *out = weight_grad + (size_t(o) * 9 + 3 * ky) * ci + c;
                if (!from_zero)
#pragma GCC unroll 8
                    for (int k = 0; k < COS; k++)
#pragma GCC unroll 3
                        for (int kx = 0; kx < 3; kx++)
                            sums[k][kx] = load(out + (size_t(k) * 9 + kx) * ci);
                for (int row = 0; row < images * size; row++) {
                    const int n = row / size, i = row % size;
                    const Unit *gs = g[n].at + i * g[n].row_step + o, *xs[3];
                    for (int kx = 0; kx < 3; kx++)
                        xs[kx] = x[n][kx].at + (size_t(i) * stride + ky) * x[n][kx].row_step + c;
                    for (int j = 0; j < count; j++) {
                        Floats taps[3];
                        for (int kx = 0; kx < 3; kx++)
                            memcpy(&taps[kx], xs[kx] + j * x[n][0].step, 64);
#pragma GCC unroll 8
                        for (int k = 0; k < COS; k++)
#pragma GCC unroll 3
                            for (int kx = 0; kx < 3; kx++)
                                sums[k][kx] = multiply_add<T>(sums[k][kx], taps[kx],
                                                              gs[j * g[n].step + k]);
                    }
                }
#pragma GCC unroll 8
                for (int k = 0; k < COS; k++)
#pragma GCC unroll 3
                    for (int kx = 0; kx < 3; kx++)
                        store(sums[k][kx], out + (size_t(k) * 9 + kx) * ci);
            }
}

constexpr int FORWARD_SHARD = 4;  // images; smaller ones end more evenly
template <int C> constexpr int BACKWARD_SHARD = C == 64 ? 8 : 4;  // each has weights to add up
constexpr int AT_ONCE = 4;  // images of 8x8 whose products are added up before they are stored

// y = convolution of x, and the sums of y as `statistics` has them. If there is a layer below whose
// output x is, that is written first, image by image.
template <class T, int C>
void convolution(const Layer &layer, const Layer *below, const Piece &piece, int threads) {
    const std::vector<Unit> weights = pack_weights<T>(layer.weight, layer.ci, C);
    const WriteOut write_below = below ? write_out_of<T>(*below) : nullptr;
    size_t stride = size_t(layer.groups) * C;
    over_shards<C>(piece, FORWARD_SHARD, threads, layer.sums + piece.group * C, stride, [&] {
        static thread_local Buffer<T> buffer;
        return [&, padded = Padded<T>(buffer, layer.size, layer.ci)](int first, int count,
                                                                     double *total) mutable {
            for (int n = first; n < first + count; n++) {
                if (below) write_below(*below, piece.group, n);
                padded.fill(layer.map<T>(layer.x, n, layer.x_size()));
                prefetch<T>(layer, below ? below->y : layer.x, n + 1, layer.x_size());
                T *y = layer.map<T>(layer.y, n, layer.y_size());
                BY_CHANNELS(layer.ci, {
                    constexpr int UNITS = C_ / PER_UNIT<T>;
                    if (layer.stride == 1) convolve<T, UNITS, 1>(padded, weights, C, y);
                    else convolve<T, UNITS, 2>(padded, weights, C, y);
                })
                add_statistics_of<T, C>(layer, n, total);  // while it is in the cache
            }
        };
    });
}

// The gradients of x and of the weights; that of y is found image by image and never written down.
// If there is a layer below whose output x is, its sums of gradients are taken at once.
template <class T, int C, bool MASK>
void convolution_back(const Layer &layer, const Layer *below, const Piece &piece, int threads) {
    const bool is_winograd = layer.stride == 1;
    const std::vector<Unit> weights =
        is_winograd ? combine_weights<T>(layer.weight, layer.ci, C)
                    : pack_weights_back<T>(layer.weight, layer.ci, C);
    const Gradient<T, C, MASK> gradient(layer, piece.group);
    const int size = layer.size / layer.stride;
    const int at_once = std::max(1, std::min(AT_ONCE, AT_ONCE * 8 / size));
    const int shards = (piece.count + BACKWARD_SHARD<C> - 1) / BACKWARD_SHARD<C>;
    const size_t numbers = size_t(9) * layer.ci * C;
    const std::unique_ptr<float[]> partial(new float[shards * numbers]);
    const AddGradStatistics add_below = below ? add_grad_statistics_of<T>(*below) : nullptr;
    std::vector<double> below_totals(below ? size_t(piece.count) * 2 * layer.ci : 0);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Buffer<T> buffer_x[AT_ONCE], buffer_g[AT_ONCE];
        static thread_local Buffer<Unit> packed[AT_ONCE][4];
        std::vector<Padded<T>> x, g;
        for (int k = 0; k < at_once; k++) {
            x.emplace_back(buffer_x[k], layer.size, layer.ci);
            g.emplace_back(buffer_g[k], size, C);
        }
        Steps taps[AT_ONCE][3], steps[AT_ONCE];
        static thread_local Buffer<Unit> combined[2];
        static thread_local Buffer<float> combined_sums;
        const size_t num_sums = is_winograd ? size_t(COMBINATIONS) * layer.ci * C : 0;
        float *sums = combined_sums.of(num_sums);
#pragma omp for schedule(dynamic, 1)
        for (int s = 0; s < shards; s++) {
            const int start = s * BACKWARD_SHARD<C>;
            const int stop = std::min(start + BACKWARD_SHARD<C>, piece.count);
            std::fill_n(sums, num_sums, 0.0f);
            for (int first = start; first < stop; first += at_once) {
                const int count = std::min(at_once, stop - first);
                for (int k = 0; k < count; k++) {
                    const int n = piece.first + first + k;
                    for (int64_t i = 0; i < size; i++)
                        gradient.write(n, i * size, (i + 1) * size, g[k].row(int(i)));
                    prefetch<T>(layer, layer.x, n, layer.x_size());
                    if (below) prefetch<T>(layer, below->y, n, layer.x_size());
                    prefetch<T>(layer, layer.y, n + 1, layer.y_size());
                    prefetch<T>(layer, gradient.of(), n + 1, layer.y_size());
                    T *grad_x = layer.map<T>(layer.grad_x, n, layer.x_size());
                    if (is_winograd) winograd<T, C>(g[k], weights, layer.ci, grad_x);
                    else
                        convolve_back<T, C / PER_UNIT<T>>(g[k], weights, layer.ci, layer.stride,
                                                          grad_x);
                    if (below)
                        add_below(*below, piece.group, n,
                                  &below_totals[size_t(first + k) * 2 * layer.ci]);
                    x[k].fill(layer.map<T>(layer.x, n, layer.x_size()));
                    if (is_winograd) continue;
                    steps_of(x[k], layer.stride, packed[k], taps[k]);
                    steps[k] = steps_of(g[k], packed[k][3]);
                }
                if (is_winograd)
                    BY_CHANNELS(layer.ci, (add_combined_gradient<T, C_, C>(
                                              x.data(), g.data(), count, combined, sums)))
                else
                    add_weight_gradient<T>(taps, steps, count, layer.ci, C, layer.stride, size,
                                           first == start, &partial[s * numbers]);
            }
            if (is_winograd)
                separate_weight_gradient(sums, layer.ci, C, &partial[s * numbers]);
        }
#pragma omp for schedule(static)
        for (size_t block = 0; block < numbers; block += 16 * C) {  // 9 ci C is a multiple
            Pixel<16 * C> total{};
            if (piece.first) total = Pixel<16 * C>(layer.weight_grad + block);  // earlier groups'
            for (int s = 0; s < shards; s++)
                for (int v = 0; v < C; v++)
                    total.part[v] += load(&partial[s * numbers + block + 16 * v]);
            for (int v = 0; v < C; v++) store(total.part[v], layer.weight_grad + block + 16 * v);
        }
    }
    if (below)
        add_up(below_totals, layer.ci, below->grad_sums + piece.group * layer.ci,
               size_t(layer.groups) * layer.ci);
}

// A layer's parts. Between sums and rest processes exchange the sums; `below` is the layer whose rest
// forward, and whose sums backward, are done on the way.

template <class T>
void forward_sums(const Layer &layer, const Layer *below, int threads) {
    for (const Piece &piece : pieces(layer))
        BY_CHANNELS(layer.co, {
            if (layer.convolves) convolution<T, C_>(layer, below, piece, threads);
            else statistics<T, C_>(layer, piece, threads);
        })
}

template <class T>
void write_out(const Layer &layer, int threads) {
    const WriteOut write = write_out_of<T>(layer);
    for (const Piece &piece : pieces(layer)) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int n = piece.first; n < piece.first + piece.count; n++)
            write(layer, piece.group, n);
    }
}

template <class T>
void backward_sums(const Layer &layer, int threads) {
    const AddGradStatistics add = add_grad_statistics_of<T>(layer);
    for (const Piece &piece : pieces(layer))
        BY_CHANNELS(layer.co, over_shards<C_>(
            piece, 1, threads, layer.grad_sums + piece.group * C_, size_t(layer.groups) * C_, [&] {
                return [&](int n, int, double *total) { add(layer, piece.group, n, total); };
            });)
    parameter_gradients(layer);
}

template <class T, int C, bool MASK>
void backward_rest(const Layer &layer, const Layer *below, int threads) {
    for (const Piece &piece : pieces(layer))
        if (layer.convolves) convolution_back<T, C, MASK>(layer, below, piece, threads);
        else grad_apply<T, C, MASK>(layer, piece, threads);
}

template <class T>
void backward_rest(const Layer &layer, const Layer *below, int threads) {
    BY_CHANNELS(layer.co, {
        if (layer.masked) backward_rest<T, C_, false>(layer, below, threads);
        else backward_rest<T, C_, true>(layer, below, threads);
    })
    if (below) parameter_gradients(*below);
}

// What kernels.py calls Crops: images (N, H, W, 3), which of them, and of each where it is cut and
// whether it is mirrored.
struct Crops {
    int count, height, width, padding;
    const uint8_t *images;
    const int64_t *which, *dy, *dx, *flip;
    const float *mean, *scale;  // (H, W, 3), (W, 3)
    float *out;
};

// Normalise, pad with zeros, cut out, mirror: a row at a time, which stays in the cache. In one
// thread: on a machine with other work, waiting for a second one takes longer.
void crop(const Crops &crops) {
    const int height = crops.height, width = crops.width, row = 3 * width;
    std::vector<float> padded(row + 6 * crops.padding, 0.0f);
    float *inner = padded.data() + 3 * crops.padding;
    for (int64_t image = 0; image < crops.count; image++) {
        const float *first = padded.data() + 3 * crops.dx[image];
        const uint8_t *pixels = crops.images + crops.which[image] * height * row;
        float *out = crops.out + image * height * row;
        for (int r = 0; r < height; r++, out += row) {
            const int64_t y = r + crops.dy[image] - crops.padding;
            if (y < 0 || y >= height) {
                std::fill(out, out + row, 0.0f);
                continue;
            }
            const uint8_t *source = pixels + y * row;
            const float *mean = crops.mean + y * row;
            for (int i = 0; i < row; i++) inner[i] = (source[i] - mean[i]) * crops.scale[i];
            if (!crops.flip[image]) {
                memcpy(out, first, row * sizeof(float));
                continue;
            }
            for (int x = 0; x < width; x++)
                for (int c = 0; c < 3; c++) out[3 * x + c] = first[3 * (width - 1 - x) + c];
        }
    }
}

}  // namespace

// A layer is two parts each way; a chain is all its layers, in one process.
#define FOR_TYPE(T, NAME)                                                            \
    void forward_sums_##NAME(const Layer *layer, int threads) {                      \
        forward_sums<T>(*layer, nullptr, threads);                                   \
    }                                                                                \
    void forward_rest_##NAME(const Layer *layer, int threads) {                      \
        finish_statistics(*layer);                                                   \
        write_out<T>(*layer, threads);                                               \
    }                                                                                \
    void backward_sums_##NAME(const Layer *layer, int threads) {                     \
        backward_sums<T>(*layer, threads);                                           \
    }                                                                                \
    void backward_rest_##NAME(const Layer *layer, int threads) {                     \
        backward_rest<T>(*layer, nullptr, threads);                                  \
    }                                                                                \
    void forward_##NAME(const Layer *layers, int count, int threads) {               \
        for (int k = 0; k < count; k++) {                                            \
            forward_sums<T>(layers[k], k ? &layers[k - 1] : nullptr, threads);       \
            finish_statistics(layers[k]);                                            \
        }                                                                            \
        write_out<T>(layers[count - 1], threads);                                    \
    }                                                                                \
    void backward_##NAME(const Layer *layers, int count, int threads) {              \
        backward_sums<T>(layers[count - 1], threads);                                \
        for (int k = count - 1; k >= 0; k--)                                         \
            backward_rest<T>(layers[k], k ? &layers[k - 1] : nullptr, threads);      \
    }

extern "C" {
FOR_TYPE(float, fp32)
FOR_TYPE(bf16, bf16)

void crop_images(const Crops *crops) { crop(*crops); }

// Whether the convolutions are worth it: with 16 sums a register, and products of bf16.
int has_convolutions_fp32() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}
int has_convolutions_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
}
