// Products by the processor's own matrices (AMX): bfloat16 values, summed in float32. An activation's sums are the
// same whatever other activations are computed beside it.
//
// Legend: n values of a row, K blocks of 32 of them, T activations of a part, at most 32.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

constexpr int64_t TILE = 16;        // rows of a tile; activations of one
constexpr int64_t TILE_VALUES = 32; // of a row in a tile
constexpr int64_t TILE_BAND = 64;   // rows of a matrix at once

// Values that an activation takes, packed.
static inline int64_t tile_width(int64_t n) { return (n + TILE_VALUES - 1) / TILE_VALUES * TILE_VALUES; }
static inline int64_t tile_values(int64_t tokens, int64_t n) { return tokens * tile_width(n); }

#if defined(__AMX_BF16__)
constexpr bool TILED = true;

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

// 32 floats of ``from``, of which ``have`` are there, as bfloat16.
static inline __m512i narrowed(const float *from, int64_t have) {
    const auto part = [&](int64_t begin) {
        const int64_t left = have - begin;
        const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
        return _mm512_maskz_loadu_ps(there, from + begin);
    };
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(16), part(0)));
}

// Activations of a part, as tiles read them: [K][those of the first tile, those of the second][16 pairs][T][2].
static inline void pack_tiles(const float *const *x, int64_t tokens, int64_t n, Bfloat16 *to) {
    for (int64_t first = 0; first < n; first += TILE_VALUES)
        for (int64_t begin = 0; begin < tokens; begin += TILE) {
            const int64_t count = std::min(TILE, tokens - begin);
            __m512i rows[16] = {};
            for (int64_t b = 0; b < count; ++b) rows[b] = narrowed(x[begin + b] + first, n - first);
            transpose(rows);
            const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
            for (int pair = 0; pair < 16; ++pair, to += 2 * count)
                _mm512_mask_storeu_epi32(to, there, rows[pair]);
        }
}

// Where tiles of a band of rows lie, all in values.
struct Band {
    const Bfloat16 *data;
    int64_t row, step, block;  // from a row to the next, from 32 values to the next, from 16 rows to the next

    const Bfloat16 *at(int64_t b, int64_t k) const { return data + b * block + k * step; }
    int bytes() const { return static_cast<int>(row * 2); }
};

static inline void put(const float *sums, int64_t rows, int64_t tokens, float *const *to, int64_t first) {
    __m512i turned[16];
    for (int r = 0; r < 16; ++r) turned[r] = _mm512_loadu_si512(sums + r * 16);
    transpose(turned);
    const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
    for (int64_t b = 0; b < tokens; ++b) _mm512_mask_storeu_epi32(to[b] + first, there, turned[b]);
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

// 32 values of a row as bfloat16; of the last of them ``have`` are there.
static inline void widen_block(Dense<Bfloat16> rows, int64_t first, int64_t have, Bfloat16 *to) {
    const __mmask32 there = have >= 32 ? 0xffffffffu : (1u << have) - 1;
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, rows.data + first));
}
static inline void widen_block(Dense<float> rows, int64_t first, int64_t have, Bfloat16 *to) {
    _mm512_storeu_si512(to, narrowed(rows.data + first, have));
}
static inline void store_pair(Vector first, Vector second, Bfloat16 *to) {
    const auto low = reinterpret_cast<__m512>(first), high = reinterpret_cast<__m512>(second);
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
template <int BITS, bool LOWEST>
static inline void widen_block(Packed<BITS, LOWEST> rows, int64_t first, int64_t, Bfloat16 *to) {
    const int64_t group = first / GROUP;
    Vector weights[2];
    unpack<BITS>(rows.data + group * GROUP * BITS / 8, weights);
    float scale, added = 0;
    rows.widen_scales(group, 1, &scale, &added);
    store_pair(weights[0] * scale + added, weights[1] * scale + added, to);
}

static inline void widen_block(Float8 rows, int64_t first, int64_t have, Bfloat16 *to) {
    alignas(32) uint8_t bytes[TILE_VALUES] = {};
    if (have < TILE_VALUES) std::memcpy(bytes, rows.data + first, have);
    Vector weights[2];
    widen_eights(have < TILE_VALUES ? bytes : rows.data + first, weights);
    const float scale = EIGHTS * rows.scales[first / FLOAT8_GROUP];
    store_pair(weights[0] * scale, weights[1] * scale, to);
}

// Up to 64 rows as tiles, one behind the other.
template <class Rows> static inline Band widened(Rows rows, int64_t n, int64_t count) {
    thread_local std::vector<Bfloat16> panel;
    const int64_t blocks = tile_width(n) / TILE_VALUES;
    panel.resize(TILE_BAND * blocks * TILE_VALUES);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0; k < blocks; ++k)
            widen_block(rows.from(r), k * TILE_VALUES, n - k * TILE_VALUES,
                        panel.data() + ((r / TILE * blocks + k) * TILE + r % TILE) * TILE_VALUES);
    return {panel.data(), TILE_VALUES, TILE * TILE_VALUES, blocks * TILE * TILE_VALUES};
}

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
constexpr bool TILED = false;
static inline void release_tiles() {}
static inline void pack_tiles(const float *const *, int64_t, int64_t, Bfloat16 *) {}
template <class Rows>
static inline void tile_products(Rows, int64_t, int64_t, const Bfloat16 *, int64_t, float *const *) {}
#endif
