// Products of many activations, in float32: rows are widened into a panel that stays in the second cache, and
// activations lie side by side, so that each weight is multiplied by a vector of them.
//
// Legend: n values of a row, T activations of a block, R rows at once, C columns of a chunk.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

constexpr int WIDE = 2;                                       // vectors of a block
constexpr int64_t PANEL_TOKENS = WIDE * LANES;                // T
constexpr int PANEL_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // R, as many as leave registers
constexpr int64_t CHUNK_COLUMNS = 256;                        // C: a block of activations stays in the first cache

static inline int64_t panel_values(int64_t tokens, int64_t n) {
    return (tokens + PANEL_TOKENS - 1) / PANEL_TOKENS * PANEL_TOKENS * n;
}

// A block of activations, value by value: [n][T], zeros where there are fewer.
static inline void pack_panel(const float *const *x, int64_t tokens, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t have = std::min<int64_t>(LANES, n - i);
        for (int64_t begin = 0; begin < PANEL_TOKENS; begin += LANES) {
            Vector values[LANES] = {};
            for (int64_t b = begin; b < std::min(begin + LANES, tokens); ++b)
                values[b - begin] = have == LANES ? load(x[b] + i) : load_part(x[b] + i, have);
            transpose(values);
            for (int64_t j = 0; j < have; ++j) store(to + (i + j) * PANEL_TOKENS + begin, values[j]);
        }
    }
}

template <class T> static inline void widen_row(Dense<T> rows, int64_t begin, int64_t end, float *to) {
    for (int64_t i = begin; i < end; ++i) to[i - begin] = widen(rows.data[i]);
}

template <int BITS, bool LOWEST>
static inline void widen_row(Packed<BITS, LOWEST> rows, int64_t begin, int64_t end, float *to) {
    constexpr int EACH = GROUP / LANES;
    for (int64_t g = begin / GROUP; g * GROUP < end; ++g) {
        float values[GROUP], scale, added = 0;
        Vector weights[EACH];
        rows.widen_scales(g, 1, &scale, &added);
        unpack<BITS>(rows.data + g * GROUP * BITS / 8, weights);
        for (int v = 0; v < EACH; ++v) store(values + v * LANES, weights[v] * scale + added);
        std::copy_n(values, std::min<int64_t>(GROUP, end - g * GROUP), to + g * GROUP - begin);
    }
}

static inline void widen_row(Float8 rows, int64_t begin, int64_t end, float *to) {
    constexpr int64_t STEP = 2 * LANES;
    for (int64_t i = begin; i < end; i += STEP) {
        const int64_t have = std::min(STEP, end - i);
        uint8_t bytes[STEP] = {};
        float values[STEP];
        Vector weights[2];
        std::memcpy(bytes, rows.data + i, have);
        widen_eights(bytes, weights);
        for (int v = 0; v < 2; ++v) store(values + v * LANES, weights[v] * (EIGHTS * rows.scales[i / FLOAT8_GROUP]));
        std::copy_n(values, have, to + i - begin);
    }
}

// R rows of a panel, ``stride`` apart, times a block of activations, added to ``sums`` [R][T].
template <int R>
static inline void panel_block(const float *rows, int64_t stride, const float *x, int64_t columns, float *sums) {
    Vector total[R][WIDE];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < WIDE; ++w) total[r][w] = load(sums + r * PANEL_TOKENS + w * LANES);
    for (int64_t i = 0; i < columns; ++i) {
        Vector active[WIDE];
        for (int w = 0; w < WIDE; ++w) active[w] = load(x + i * PANEL_TOKENS + w * LANES);
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < WIDE; ++w) total[r][w] += active[w] * rows[r * stride + i];
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < WIDE; ++w) store(sums + r * PANEL_TOKENS + w * LANES, total[r][w]);
}

// Puts the products of ``count`` rows with activation b into to[b]; ``x`` as pack_panel left them.
template <class Rows>
static inline void panel_products(Rows rows, int64_t n, int64_t count, const float *x, int64_t tokens,
                                  float *const *to) {
    thread_local std::vector<float> panel, sums;
    const int64_t blocks = (tokens + PANEL_TOKENS - 1) / PANEL_TOKENS;
    panel.resize(count * CHUNK_COLUMNS);
    sums.assign(blocks * count * PANEL_TOKENS, 0.0f);
    for (int64_t first = 0; first < n; first += CHUNK_COLUMNS) {
        const int64_t columns = std::min(CHUNK_COLUMNS, n - first);
        for (int64_t r = 0; r < count; ++r)
            widen_row(rows.from(r), first, first + columns, panel.data() + r * CHUNK_COLUMNS);
        for (int64_t block = 0; block < blocks; ++block) {
            const float *active = x + (block * n + first) * PANEL_TOKENS;
            float *own = sums.data() + block * count * PANEL_TOKENS;
            int64_t r = 0;
            for (; r + PANEL_ROWS <= count; r += PANEL_ROWS)
                panel_block<PANEL_ROWS>(panel.data() + r * CHUNK_COLUMNS, CHUNK_COLUMNS, active, columns,
                                        own + r * PANEL_TOKENS);
            for (; r < count; ++r)
                panel_block<1>(panel.data() + r * CHUNK_COLUMNS, CHUNK_COLUMNS, active, columns,
                               own + r * PANEL_TOKENS);
        }
    }
    for (int64_t b = 0; b < tokens; b += LANES) {
        const float *own = sums.data() + b / PANEL_TOKENS * count * PANEL_TOKENS + b % PANEL_TOKENS;
        for (int64_t r = 0; r < count; r += LANES) {
            const int64_t have = std::min<int64_t>(LANES, count - r);
            Vector values[LANES] = {};
            for (int64_t j = 0; j < have; ++j) values[j] = load(own + (r + j) * PANEL_TOKENS);
            transpose(values);
            for (int64_t i = 0; i < std::min<int64_t>(LANES, tokens - b); ++i)
                std::memcpy(to[b + i] + r, values + i, have * sizeof(float));
        }
    }
}
