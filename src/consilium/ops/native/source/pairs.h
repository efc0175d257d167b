// Products of many activations where the processor sums pairs of bfloat16 at once (AVX512_BF16) and has no matrices of
// its own: a lane is an activation, packed as for tiles, and each pair of a row is spread over all lanes.
//
// Legend: K blocks of 32 values of a row, T activations of a part, at most 32, R rows at once, S sums of a tile.
#pragma once

#include "narrow.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr int64_t PAIR_BLOCKS = 8;       // of K at once: their activations stay in the first cache
constexpr int64_t SUMS = TILE * TILE;    // S

static inline __m512bh spread_pair(const Bfloat16 *from) {
    int32_t both;
    std::memcpy(&both, from, sizeof both);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

// R rows of a band, so many blocks, with the activations of WIDE tiles, added to ``sums`` [WIDE][.., R][TILE].
template <int WIDE>
static inline void pair_block(const Bfloat16 *rows, int64_t blocks, const Bfloat16 *x, float *sums) {
    __m512 total[HELD][WIDE];
    for (int r = 0; r < HELD; ++r)
        for (int w = 0; w < WIDE; ++w) total[r][w] = _mm512_loadu_ps(sums + w * SUMS + r * TILE);
    for (int64_t k = 0; k < blocks; ++k, x += WIDE * TILE_VALUES * TILE)
        for (int64_t pair = 0; pair < TILE_VALUES / 2; ++pair) {
            __m512bh active[WIDE];
            for (int w = 0; w < WIDE; ++w) {
                const Bfloat16 *lanes = x + (w * TILE_VALUES / 2 + pair) * 2 * TILE;
                active[w] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(lanes));
            }
            for (int r = 0; r < HELD; ++r) {
                const __m512bh spread = spread_pair(rows + (k * HELD + r) * TILE_VALUES + 2 * pair);
                for (int w = 0; w < WIDE; ++w) total[r][w] = _mm512_dpbf16_ps(total[r][w], active[w], spread);
            }
        }
    for (int r = 0; r < HELD; ++r)
        for (int w = 0; w < WIDE; ++w) _mm512_storeu_ps(sums + w * SUMS + r * TILE, total[r][w]);
}

// A band of rows with a part of activations, in WIDE tiles.
template <int WIDE>
static inline void pair_part(const Band &band, int64_t rows, int64_t blocks, const Bfloat16 *x, int64_t tokens,
                             float *const *to) {
    alignas(64) float sums[TILE_BAND / TILE * WIDE * SUMS] = {};
    for (int64_t k = 0; k < blocks; k += PAIR_BLOCKS)
        for (int64_t r = 0; r < rows; r += HELD)
            pair_block<WIDE>(band.at(r / HELD, k), std::min(PAIR_BLOCKS, blocks - k), x + k * WIDE * TILE_VALUES * TILE,
                             sums + r / TILE * WIDE * SUMS + r % TILE * TILE);
    for (int64_t r = 0; r < rows; r += TILE)
        for (int64_t w = 0; w < WIDE; ++w)
            put(sums + (r / TILE * WIDE + w) * SUMS, std::min(TILE, rows - r), std::min(TILE, tokens - w * TILE),
                to + w * TILE, r);
}

// R rows of pairs of shares, ``stride`` apart, with as many vectors of 32 values in pairs, ``step`` apart, into ``to``.
static inline void pair_shares(const Bfloat16 *shares, int64_t stride, const Bfloat16 *values, int64_t step,
                               int64_t count, float (*to)[2 * TILE]) {
    __m512 total[HELD][2] = {};
    for (int64_t pair = 0; pair < count; ++pair, values += step) {
        const auto low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(values));
        const auto high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(values + 2 * TILE));
        for (int r = 0; r < HELD; ++r) {
            const __m512bh spread = spread_pair(shares + r * stride + 2 * pair);
            total[r][0] = _mm512_dpbf16_ps(total[r][0], low, spread);
            total[r][1] = _mm512_dpbf16_ps(total[r][1], high, spread);
        }
    }
    for (int r = 0; r < HELD; ++r)
        for (int w = 0; w < 2; ++w) _mm512_storeu_ps(to[r] + w * TILE, total[r][w]);
}

// Puts the products of ``count`` rows with activation b into to[b]; ``x`` as pack_tiles left parts of 32.
template <class Rows>
static inline void tile_products(Rows rows, int64_t n, int64_t count, const Bfloat16 *x, int64_t tokens,
                                 float *const *to) {
    const int64_t blocks = tile_width(n) / TILE_VALUES, most = 2 * TILE;
    float *at[2 * TILE];
    for (int64_t begin = 0; begin < count; begin += TILE_BAND) {
        const int64_t band_rows = std::min(TILE_BAND, count - begin);
        const Band band = widened(rows.from(begin), n, band_rows);
        for (int64_t part = 0; part < tokens; part += most) {
            const int64_t some = std::min(most, tokens - part);
            for (int64_t b = 0; b < some; ++b) at[b] = to[part + b] + begin;
            const auto part_of = some > TILE ? pair_part<2> : pair_part<1>;
            part_of(band, band_rows, blocks, x + part * tile_width(n), some, at);
        }
    }
}
#endif
