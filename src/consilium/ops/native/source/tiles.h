// Products by the processor's own matrices (AMX).
//
// Legend: n values of a row, K blocks of 32 of them, T activations of a part, at most 32.
#pragma once

#include "narrow.h"

#if defined(__AMX_BF16__)
struct alignas(64) Palette {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// How many activations the tiles of this thread are set for; 0: none.
inline thread_local int64_t tiles_set = 0;

// Tiles 0 to 3 are sums, 4 and 5 rows of the matrix, 6 and 7 activations. Up to 16 activations: 0 to 3 are of four
// blocks of rows; up to 32: 0 and 1 of one block with the first 16 and with the others, 2 and 3 of the next.
static inline void set_tiles(int64_t tokens) {
    if (tiles_set == tokens) return;
    const auto first = static_cast<uint16_t>(4 * std::min(tokens, TILE));
    const auto second = static_cast<uint16_t>(tokens > TILE ? 4 * (tokens - TILE) : first);
    Palette palette;
    for (const int t : {0, 1, 2, 3, 4, 5, 6, 7}) palette.rows[t] = TILE, palette.bytes[t] = first;
    palette.bytes[4] = palette.bytes[5] = 64;
    palette.bytes[1] = palette.bytes[3] = palette.bytes[7] = second;
    _tile_loadconfig(&palette);
    tiles_set = tokens;
}

static inline void release_tiles() {
    if (tiles_set) _tile_release();
    tiles_set = 0;
}

#define STORE_TILE(tile, block, begin, count)                                                                    \
    if (rows > (block) * TILE) {                                                                                  \
        _tile_stored(tile, sums, 64);                                                                             \
        put(sums, std::min(TILE, rows - (block) * TILE), count, to + (begin), (block) * TILE);                    \
    }

// Lines ahead at which a band that is read where it lies is fetched, and behind its end those of the next.
constexpr int64_t AHEAD = 8;

static inline void fetch(const Band &band, int64_t k, int64_t blocks) {
    const int64_t ahead = k + AHEAD, beyond = ahead < blocks ? 0 : 4;
    const Bfloat16 *from = band.data + beyond * band.block + (beyond ? ahead - blocks : ahead) * band.step;
    for (int64_t r = 0; r < TILE_BAND; ++r) __builtin_prefetch(from + r * band.row);
}

// Up to 16 activations with up to 64 rows.
static inline void tile_few(const Band &band, int64_t rows, int64_t blocks, const Bfloat16 *x, int64_t tokens,
                            float *const *to, bool in_place) {
    alignas(64) float sums[256];
    const int bytes = static_cast<int>(4 * tokens);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < blocks; ++k) {
        if (in_place) fetch(band, k, blocks);
        _tile_loadd(6, x + k * TILE_VALUES * tokens, bytes);
        _tile_loadd(4, band.at(0, k), band.bytes());
        _tile_dpbf16ps(0, 4, 6);
        if (rows > TILE) {
            _tile_loadd(5, band.at(1, k), band.bytes());
            _tile_dpbf16ps(1, 5, 6);
        }
        if (rows > 2 * TILE) {
            _tile_loadd(4, band.at(2, k), band.bytes());
            _tile_dpbf16ps(2, 4, 6);
        }
        if (rows > 3 * TILE) {
            _tile_loadd(5, band.at(3, k), band.bytes());
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    STORE_TILE(0, 0, 0, tokens)
    STORE_TILE(1, 1, 0, tokens)
    STORE_TILE(2, 2, 0, tokens)
    STORE_TILE(3, 3, 0, tokens)
}

// 17 to 32 activations with up to 32 rows.
static inline void tile_many(const Band &band, int64_t rows, int64_t blocks, const Bfloat16 *x, int64_t tokens,
                             float *const *to) {
    alignas(64) float sums[256];
    const int64_t others = tokens - TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < blocks; ++k) {
        const Bfloat16 *active = x + k * TILE_VALUES * tokens;
        _tile_loadd(6, active, 64);
        _tile_loadd(7, active + TILE_VALUES * TILE, static_cast<int>(4 * others));
        _tile_loadd(4, band.at(0, k), band.bytes());
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > TILE) {
            _tile_loadd(5, band.at(1, k), band.bytes());
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    STORE_TILE(0, 0, 0, TILE)
    STORE_TILE(1, 0, TILE, others)
    STORE_TILE(2, 1, 0, TILE)
    STORE_TILE(3, 1, TILE, others)
}
#undef STORE_TILE

// A matrix of bfloat16 is read where it lies, where whole tiles are.
template <class Rows> static inline bool lies_in_tiles(Rows, int64_t, int64_t) { return false; }
static inline bool lies_in_tiles(Dense<Bfloat16>, int64_t n, int64_t count) {
    return n % TILE_VALUES == 0 && count % TILE == 0;
}
template <class Rows> static inline Band in_place(Rows, int64_t) { return {}; }
static inline Band in_place(Dense<Bfloat16> rows, int64_t) {
    return {rows.data, rows.stride, TILE_VALUES, TILE * rows.stride};
}

// Puts the products of ``count`` rows with activation b into to[b]; ``x`` as pack_tiles left parts of 32.
template <class Rows>
static inline void tile_products(Rows rows, int64_t n, int64_t count, const Bfloat16 *x, int64_t tokens,
                                 float *const *to) {
    const int64_t blocks = tile_width(n) / TILE_VALUES, most = 2 * TILE;
    std::vector<float *> at(std::min(tokens, most));
    for (int64_t begin = 0; begin < count; begin += TILE_BAND) {
        const int64_t band_rows = std::min(TILE_BAND, count - begin);
        const bool lies = lies_in_tiles(rows, n, band_rows);
        const Band band = lies ? in_place(rows.from(begin), n) : widened(rows.from(begin), n, band_rows);
        for (int64_t part = 0; part < tokens; part += most) {
            const int64_t some = std::min(most, tokens - part);
            const Bfloat16 *active = x + part * tile_width(n);
            for (int64_t b = 0; b < some; ++b) at[b] = to[part + b] + begin;
            set_tiles(some);
            if (some <= TILE) {
                tile_few(band, band_rows, blocks, active, some, at.data(), lies);
                continue;
            }
            for (int64_t half = 0; half < band_rows; half += most) {
                const Band own{band.data + half / TILE * band.block, band.row, band.step, band.block};
                tile_many(own, std::min(most, band_rows - half), blocks, active, some, at.data());
                for (int64_t b = 0; b < some; ++b) at[b] += most;
            }
        }
    }
}
#else
static inline void release_tiles() {}
#endif
