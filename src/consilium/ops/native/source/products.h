// Products of few rows of activations with a matrix: each value is summed in one fixed order, whatever else is
// computed beside it.
//
// Legend: R rows of the matrix at once, B activations at once, n values of a row.
#pragma once

#include "vectors.h"

constexpr int ROWS = 4;                       // of a matrix that are read at once, each a stream of its own
constexpr int TOKENS = LANES == 16 ? 4 : 2;   // as many as leave registers for the sums

// Rows of floating-point values, ``stride`` apart.
template <class T> struct Dense {
    const T *data;
    int64_t stride;

    Dense from(int64_t row) const { return {data + row * stride, stride}; }
};

// Rows in groups of 32 integers that share a scale. An 8-bit group is 32 bytes; a 4-bit group 16, of which each
// holds value j in its lower half and value j + 16 in its upper one, both 8 more than they are.
constexpr int GROUP = 32;
template <int BITS> struct Packed {
    const uint8_t *data;
    const Half *scales;
    int64_t groups;

    Packed from(int64_t row) const {
        return {data + row * groups * GROUP * BITS / 8, scales + row * groups, groups};
    }
};

// The R x B products of rows with activations of n values.
template <int R, int B, class T>
static inline void dots(Dense<T> rows, int64_t n, const float *const *x, float (*out)[B]) {
    Vector sums[R][B] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector active[B];
        for (int b = 0; b < B; ++b) active[b] = load(x[b] + i);
        for (int r = 0; r < R; ++r) {
            if (i % (64 / static_cast<int>(sizeof(T))) == 0)
                __builtin_prefetch(rows.data + (r + R) * rows.stride + i);
            const Vector weight = load(rows.data + r * rows.stride + i);
            for (int b = 0; b < B; ++b) sums[r][b] += weight * active[b];
        }
    }
    if (i < n)
        for (int r = 0; r < R; ++r) {
            const Vector weight = load_part(rows.data + r * rows.stride + i, n - i);
            for (int b = 0; b < B; ++b) sums[r][b] += weight * load_part(x[b] + i, n - i);
        }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) out[r][b] = sum(sums[r][b]);
}

template <int R, int B, int BITS>
static inline void dots(Packed<BITS> rows, int64_t n, const float *const *x, float (*out)[B]) {
    constexpr int BYTES = GROUP * BITS / 8, CHUNK = 32;  // groups whose scales are widened at once
    alignas(64) float rest[B][GROUP] = {};
    float scales[R][CHUNK];
    Vector sums[R][B] = {};
    for (int64_t first = 0; first < rows.groups; first += CHUNK) {
        const int64_t end = first + CHUNK < rows.groups ? first + CHUNK : rows.groups;
        for (int r = 0; r < R; ++r) widen_halves(rows.scales + r * rows.groups + first, end - first, scales[r]);
        for (int64_t g = first; g < end; ++g) {
            const float *active[B];
            for (int b = 0; b < B; ++b) {
                active[b] = x[b] + g * GROUP;
                if ((g + 1) * GROUP <= n) continue;
                std::memcpy(rest[b], active[b], (n - g * GROUP) * sizeof(float));
                active[b] = rest[b];
            }
            for (int r = 0; r < R; ++r) {
                const uint8_t *group = rows.data + (r * rows.groups + g) * BYTES;
                if (g % (64 / BYTES) == 0) __builtin_prefetch(group + R * rows.groups * BYTES);
                Vector weights[GROUP / LANES];
                unpack<BITS>(group, weights);
                for (int b = 0; b < B; ++b) {
                    Vector part = weights[0] * load(active[b]);
                    for (int v = 1; v < GROUP / LANES; ++v) part += weights[v] * load(active[b] + v * LANES);
                    sums[r][b] += part * scales[r][g - first];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) out[r][b] = sum(sums[r][b]);
}

template <int B, class Rows, class Sink>
static inline void products_of(Rows rows, int64_t n, int64_t count, const float *const *x, int64_t first,
                               Sink &sink) {
    int64_t r = 0;
    float out[ROWS][B];
    for (; r + ROWS <= count; r += ROWS) {
        dots<ROWS, B>(rows.from(r), n, x, out);
        for (int i = 0; i < ROWS; ++i)
            for (int b = 0; b < B; ++b) sink(r + i, first + b, out[i][b]);
    }
    for (; r < count; ++r) {
        dots<1, B>(rows.from(r), n, x, out);
        for (int b = 0; b < B; ++b) sink(r, first + b, out[0][b]);
    }
}

// Calls sink(row, activation, product) for ``count`` rows of n values and ``tokens`` activations.
template <class Rows, class Sink>
static inline void products(Rows rows, int64_t n, int64_t count, const float *const *x, int64_t tokens,
                            Sink &&sink) {
    constexpr int64_t BAND = 16;  // rows that stay in the first cache while all activations pass
    for (int64_t begin = 0; begin < count; begin += BAND) {
        const int64_t band = count - begin < BAND ? count - begin : BAND;
        auto shifted = [&](int64_t row, int64_t b, float value) { sink(begin + row, b, value); };
        int64_t b = 0;
        for (; b + TOKENS <= tokens; b += TOKENS)
            products_of<TOKENS>(rows.from(begin), n, band, x + b, b, shifted);
        for (; b < tokens; ++b) products_of<1>(rows.from(begin), n, band, x + b, b, shifted);
    }
}

// out[b] += sum over rows of share[b][row] times the row, for B outputs of n values.
template <int B, class T>
static inline void mix(const T *rows, int64_t stride, int64_t n, int64_t count, const float *const *share,
                       float *const *out) {
    constexpr int WIDE = 2;
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        Vector sums[B][WIDE];
        for (int b = 0; b < B; ++b)
            for (int w = 0; w < WIDE; ++w) sums[b][w] = load(out[b] + i + w * LANES);
        for (int64_t r = 0; r < count; ++r)
            for (int w = 0; w < WIDE; ++w) {
                const Vector value = load(rows + r * stride + i + w * LANES);
                for (int b = 0; b < B; ++b) sums[b][w] += value * share[b][r];
            }
        for (int b = 0; b < B; ++b)
            for (int w = 0; w < WIDE; ++w) store(out[b] + i + w * LANES, sums[b][w]);
    }
    for (; i < n; ++i)
        for (int b = 0; b < B; ++b)
            for (int64_t r = 0; r < count; ++r) out[b][i] = std::fma(share[b][r], widen(rows[r * stride + i]), out[b][i]);
}

// x / sqrt(mean(x^2) + epsilon) * weight (1910.07467); ``out`` may be ``x``.
template <class T>
static inline void normalise(const float *x, const T *weight, int64_t n, float epsilon, float *out) {
    Vector squares{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    if (i < n) squares += load_part(x + i, n - i) * load_part(x + i, n - i);
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + epsilon);
    for (i = 0; i < n; ++i) out[i] = x[i] * scale * widen(weight[i]);
}
