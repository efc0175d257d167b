// Activations and rows as bfloat16, for products that are summed in float32. An activation's sums are the same whatever
// other activations are computed beside it.
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
// Whether the processor has matrices of its own (AMX), and whether it sums pairs of bfloat16 at once (AVX512_BF16).
#if defined(__AMX_BF16__)
constexpr bool TILED = true, PAIRED = true;
#elif defined(__AVX512BF16__)
constexpr bool TILED = false, PAIRED = true;
#else
constexpr bool TILED = false, PAIRED = false;
#endif
constexpr int64_t HELD = TILED ? TILE : 8;  // rows of a block, which lie together

// Activations that ``tokens`` of one tile take packed: tiles are as small as they, lanes are as many as there are.
static inline int64_t packed_tokens(int64_t tokens) { return TILED ? tokens : (tokens + TILE - 1) / TILE * TILE; }
static inline int64_t tile_values(int64_t tokens, int64_t n) { return packed_tokens(tokens) * tile_width(n); }

#if defined(__AVX512BF16__)
// The first values of ``from`` that ``there`` names as bfloat16, zeros for the others.
static inline __m256i sixteen(const float *from, __mmask16 there) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from)));
}
static inline __m256i sixteen(const Bfloat16 *from, __mmask16 there) {
    return _mm256_maskz_loadu_epi16(there, from);
}

// Values of two rows side by side, each pair a word.
static inline __m512i side_by_side(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// 32 values of ``from``, of which ``have`` are there, as bfloat16.
static inline __m512i narrowed(const Bfloat16 *from, int64_t have) {
    return _mm512_maskz_loadu_epi16(have >= 32 ? 0xffffffffu : (1u << have) - 1, from);
}
static inline __m512i narrowed(const float *from, int64_t have) {
    const auto part = [&](int64_t begin) {
        const int64_t left = have - begin;
        const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
        return _mm512_maskz_loadu_ps(there, from + begin);
    };
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(16), part(0)));
}

// Activations of a part, as tiles read them: [K][those of the first tile, those of the second][16 pairs][T][2], and
// zeros for lanes beyond them.
static inline void pack_tiles(const float *const *x, int64_t tokens, int64_t n, Bfloat16 *to) {
    for (int64_t first = 0; first < n; first += TILE_VALUES)
        for (int64_t begin = 0; begin < tokens; begin += TILE) {
            const int64_t count = std::min(TILE, tokens - begin);
            __m512i rows[16] = {};
            for (int64_t b = 0; b < count; ++b) rows[b] = narrowed(x[begin + b] + first, n - first);
            transpose(rows);
            const int64_t stored = packed_tokens(count);
            const auto there = static_cast<__mmask16>((1u << stored) - 1);
            for (int pair = 0; pair < 16; ++pair, to += 2 * stored)
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

// 32 values of a row as bfloat16; of the last of them ``have`` are there.
static inline void widen_block(Dense<Bfloat16> rows, int64_t first, int64_t have, Bfloat16 *to) {
    _mm512_storeu_si512(to, narrowed(rows.data + first, have));
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
    thread_local Buffer<Bfloat16> panel;
    const int64_t blocks = tile_width(n) / TILE_VALUES;
    panel.want(TILE_BAND * blocks * TILE_VALUES);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0; k < blocks; ++k)
            widen_block(rows.from(r), k * TILE_VALUES, n - k * TILE_VALUES,
                        panel.data() + ((r / HELD * blocks + k) * HELD + r % HELD) * TILE_VALUES);
    return {panel.data(), TILE_VALUES, HELD * TILE_VALUES, blocks * HELD * TILE_VALUES};
}
#else
static inline void pack_tiles(const float *const *, int64_t, int64_t, Bfloat16 *) {}
template <class Rows>
static inline void tile_products(Rows, int64_t, int64_t, const Bfloat16 *, int64_t, float *const *) {}
#endif
