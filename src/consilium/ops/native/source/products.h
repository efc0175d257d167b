// Products of few rows of activations with a matrix: each value is summed in one fixed order, whatever else is
// computed beside it.
//
// Legend: R rows of the matrix at once, B activations at once, n values of a row.
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int ROWS = 4;                       // of a matrix that are read at once, each a stream of its own
constexpr int TOKENS = LANES == 16 ? 4 : 2;   // as many as leave registers for the sums

// How many rows ahead are fetched at most, into the second cache: the first one waits for too few lines at a time.
constexpr int64_t AHEAD_ROWS = 16;

// Rows of floating-point values, ``stride`` apart.
template <class T> struct Dense {
    const T *data;
    int64_t stride;

    Dense from(int64_t row) const { return {data + row * stride, stride}; }
    // How many rows ahead to fetch, at least those behind the ``now`` that are read: of short ones more.
    int64_t ahead(int64_t now) const {
        return std::max(now, std::min(AHEAD_ROWS, 8192 / (stride * static_cast<int64_t>(sizeof(T)))));
    }
};

// Rows in groups of 32 integers that share a scale. An 8-bit group is 32 bytes; a 4-bit group 16, of which each
// holds value j in its lower half and value j + 16 in its upper one, both 8 more than they are; or, with the LOWEST
// value of each group behind the scales of its row, what is above that.
constexpr int GROUP = 32;
template <int BITS, bool LOWEST = false> struct Packed {
    const uint8_t *data;
    const Half *scales;
    int64_t groups;

    Packed from(int64_t row) const {
        return {data + row * groups * GROUP * BITS / 8, scales + row * groups * (LOWEST ? 2 : 1), groups};
    }

    // Of ``count`` groups from ``first`` on: scales, and what is added to integers less 8, once they are scaled.
    void widen_scales(int64_t first, int64_t count, float *to, float *added) const {
        widen_halves(scales + first, count, to);
        if (!LOWEST) return;
        widen_halves(scales + groups + first, count, added);
        for (int64_t g = 0; g < count; ++g) added[g] += 8 * to[g];
    }
};

// Rows of floats in 8 bits (e4m3), of which each FLOAT8_GROUP share a scale.
constexpr int64_t FLOAT8_GROUP = 128;
struct Float8 {
    const uint8_t *data;
    const float *scales;
    int64_t stride;

    int64_t groups() const { return (stride + FLOAT8_GROUP - 1) / FLOAT8_GROUP; }
    Float8 from(int64_t row) const { return {data + row * stride, scales + row * groups(), stride}; }
};

// The R x B products of rows with activations of n values.
template <int R, int B, class T>
static inline void dots(Dense<T> rows, int64_t n, const float *const *x, float (*out)[B]) {
    const int64_t ahead = rows.ahead(R);
    Vector sums[R][B] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector active[B];
        for (int b = 0; b < B; ++b) active[b] = load(x[b] + i);
        for (int r = 0; r < R; ++r) {
            if (i % (64 / static_cast<int>(sizeof(T))) == 0)
                __builtin_prefetch(rows.data + (r + ahead) * rows.stride + i, 0, 2);
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

template <int R, int B>
static inline void dots(Float8 rows, int64_t n, const float *const *x, float (*out)[B]) {
    Vector sums[R][B] = {};
    for (int64_t first = 0; first < n; first += FLOAT8_GROUP) {
        const int64_t end = first + FLOAT8_GROUP < n ? first + FLOAT8_GROUP : n;
        Vector own[R][B] = {};
        int64_t i = first;
        for (; i + 2 * LANES <= end; i += 2 * LANES)
            for (int r = 0; r < R; ++r) {
                if (i % 64 == 0) __builtin_prefetch(rows.data + (r + AHEAD_ROWS) * rows.stride + i, 0, 2);
                Vector weight[2];
                widen_eights(rows.data + r * rows.stride + i, weight);
                for (int b = 0; b < B; ++b)
                    own[r][b] += weight[0] * load(x[b] + i) + weight[1] * load(x[b] + i + LANES);
            }
        if (i < end)
            for (int r = 0; r < R; ++r) {
                uint8_t left[2 * LANES] = {};
                std::memcpy(left, rows.data + r * rows.stride + i, end - i);
                Vector weight[2];
                widen_eights(left, weight);
                for (int b = 0; b < B; ++b) {
                    float active[2 * LANES] = {};
                    std::memcpy(active, x[b] + i, (end - i) * sizeof(float));
                    own[r][b] += weight[0] * load(active) + weight[1] * load(active + LANES);
                }
            }
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) sums[r][b] += own[r][b] * (EIGHTS * rows.from(r).scales[first / FLOAT8_GROUP]);
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) out[r][b] = sum(sums[r][b]);
}

template <int B, class Rows, class X>
static inline void products_of(Rows rows, int64_t n, int64_t count, X x, float *const *to) {
    int64_t r = 0;
    float out[ROWS][B];
    for (; r + ROWS <= count; r += ROWS) {
        dots<ROWS, B>(rows.from(r), n, x, out);
        for (int b = 0; b < B; ++b)
            for (int i = 0; i < ROWS; ++i) to[b][r + i] = out[i][b];
    }
    for (; r < count; ++r) {
        dots<1, B>(rows.from(r), n, x, out);
        for (int b = 0; b < B; ++b) to[b][r] = out[0][b];
    }
}

// Puts the products of ``count`` rows of n values with activation b into to[b]. ``x`` is an array of activations,
// as dots reads them.
template <class Rows, class X>
static inline void products(Rows rows, int64_t n, int64_t count, X x, int64_t tokens, float *const *to) {
    constexpr int64_t BAND = 16;  // rows that stay in the first cache while all activations pass
    float *shifted[TOKENS];
    for (int64_t begin = 0; begin < count; begin += BAND) {
        const int64_t band = count - begin < BAND ? count - begin : BAND;
        int64_t b = 0;
        for (; b + TOKENS <= tokens; b += TOKENS) {
            for (int i = 0; i < TOKENS; ++i) shifted[i] = to[b + i] + begin;
            products_of<TOKENS>(rows.from(begin), n, band, x + b, shifted);
        }
        for (; b < tokens; ++b) {
            shifted[0] = to[b] + begin;
            products_of<1>(rows.from(begin), n, band, x + b, shifted);
        }
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
                __builtin_prefetch(rows + (r + AHEAD_ROWS) * stride + i + w * LANES, 0, 2);
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
