// Products of packed rows with rounded activations where the processor sums four products of bytes at once (VNNI):
// sixteen rows at a time, so that a lane is a row.
//
// For several activations the rows are turned, for one its sums are. Either way the integers of a group are summed
// exactly, and groups in one order: a value is the same whatever activations are beside its own, in a prompt too.
//
// Legend: B activations at once, R rows of a band, G groups.
#pragma once

#include "integers.h"

#if defined(__AVX512VNNI__)
constexpr int64_t BAND_ROWS = 16;           // R
constexpr int64_t GROUP_WORDS = GROUP / 4;  // of the four bytes that are multiplied at once

struct alignas(64) Line {
    int32_t lanes[BAND_ROWS];  // [R] words of four bytes, or floats
};
static inline __m512i integers(const Line &line) { return _mm512_load_si512(&line); }
static inline __m512 floats(const Line &line) { return _mm512_load_ps(&line); }

struct Band16 {
    Buffer<Line> held;            // its bytes, where rows of it are missing
    Buffer<Line> words;           // turned: [G][words of a group] of unsigned bytes
    Buffer<Line> beside;          // one activation, as it lies beside rows
    Buffer<Line> scales, lowest;  // [G] of each row
};

// Four words of each row of a band, ``stride`` bytes apart.
static inline void turn_words(const uint8_t *from, int64_t stride, __m512i *found) {
    __m512i rows[4];
    for (int64_t r = 0; r < 4; ++r) {
        const auto part = [&](int64_t lane) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + (4 * lane + r) * stride));
        };
        rows[r] = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
        rows[r] = _mm512_inserti32x4(_mm512_inserti32x4(rows[r], part(2), 2), part(3), 3);
    }
    const __m512i even[2] = {_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1])};
    const __m512i odd[2] = {_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3])};
    for (int half = 0; half < 2; ++half) {
        found[2 * half] = _mm512_unpacklo_epi64(even[half], odd[half]);
        found[2 * half + 1] = _mm512_unpackhi_epi64(even[half], odd[half]);
    }
}

// 64 bytes of weights of 8 bits, unsigned.
static inline __m512i raised(__m512i bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}
// The lower, or the upper halves of 64 bytes.
static inline __m512i lower(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
static inline __m512i upper(__m512i bytes) { return lower(_mm512_srli_epi16(bytes, 4)); }

// Four words that were turned, as unsigned bytes: of 4 bits the lower halves are the first words of a group.
template <int BITS> static inline void spread_words(const __m512i *found, Line *to) {
    for (int w = 0; w < 4; ++w)
        if constexpr (BITS == 8) {
            _mm512_store_si512(to + w, raised(found[w]));
        } else {
            _mm512_store_si512(to + w, lower(found[w]));
            _mm512_store_si512(to + 4 + w, upper(found[w]));
        }
}

// The first ``groups`` scales of each row, ``stride`` apart, a vector for each group.
static inline void turn_scales(const Half *from, int64_t stride, int64_t rows, int64_t groups, Line *to) {
    for (int64_t first = 0; first < groups; first += BAND_ROWS) {
        const int64_t count = std::min(BAND_ROWS, groups - first);
        const auto there = static_cast<__mmask16>((1u << count) - 1);
        __m512i found[BAND_ROWS];
        for (int64_t r = 0; r < BAND_ROWS; ++r) {
            const __mmask16 own = r < rows ? there : 0;
            const __m256i halves = _mm256_maskz_loadu_epi16(own, from + r * stride + first);
            found[r] = reinterpret_cast<__m512i>(_mm512_cvtph_ps(halves));
        }
        transpose(found);
        for (int64_t g = 0; g < count; ++g) _mm512_store_si512(to + first + g, found[g]);
    }
}

// The lines of the next band, of as many ``bytes``, go to the second cache one after the other: the first one waits
// for too few at a time, and whole rows side by side are not what memory gives fastest.
static inline void fetch(const void *next, int64_t first, int64_t bytes) {
    for (int64_t i = first; i < first + bytes; i += 64)
        __builtin_prefetch(static_cast<const uint8_t *>(next) + i, 0, 2);
}

// What is the same for all activations: the bytes of a band, those of rows that are not there zeros, and its scales.
template <int BITS, bool LOWEST>
static inline const uint8_t *open_band(Packed<BITS, LOWEST> rows, int64_t count, Band16 &band) {
    const int64_t stride = rows.groups * GROUP * BITS / 8, apart = rows.groups * (LOWEST ? 2 : 1);
    fetch(rows.scales + BAND_ROWS * apart, 0, BAND_ROWS * apart * static_cast<int64_t>(sizeof(Half)));
    turn_scales(rows.scales, apart, count, rows.groups, band.scales.data());
    if (LOWEST) turn_scales(rows.scales + rows.groups, apart, count, rows.groups, band.lowest.data());
    if (count == BAND_ROWS) return rows.data;
    auto *held = reinterpret_cast<uint8_t *>(band.held.data());
    std::memset(held + count * stride, 0, (BAND_ROWS - count) * stride);
    return static_cast<const uint8_t *>(std::memcpy(held, rows.data, count * stride));
}

template <int BITS>
static inline void turn_band(const uint8_t *from, int64_t groups, const uint8_t *next, Band16 &band) {
    const int64_t stride = groups * GROUP * BITS / 8;
    for (int64_t first = 0; first < stride; first += 16) {
        __m512i found[4];
        fetch(next, BAND_ROWS * first, BAND_ROWS * 16);
        turn_words(from + first, stride, found);
        spread_words<BITS>(found, band.words.data() + first / 4 * 8 / BITS);
    }
}

// Adds what integers of a group make of every row to the sums of an activation.
template <bool LOWEST, class X>
static inline __m512 add_group(__m512 sums, __m512i total, const Band16 &band, int64_t g, const X &x) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(total), floats(band.scales.data()[g]));
    sums = _mm512_fmadd_ps(scaled, _mm512_set1_ps(x.scales[0]), sums);
    return LOWEST ? _mm512_fmadd_ps(floats(band.lowest.data()[g]), _mm512_set1_ps(x.wholes[0]), sums) : sums;
}

// B activations with a band that was turned: what unsigned weights have too much is where their sums begin, or there
// is a lowest value.
template <int B, int BITS, bool LOWEST>
static inline void band_block(const Band16 &band, int64_t groups, const Rounded<BITS> *const *x, __mmask16 there,
                              float *const *to) {
    __m512 sums[B] = {};
    for (int64_t g = 0; g < groups; ++g) {
        __m512i total[B];
        for (int b = 0; b < B; ++b) total[b] = _mm512_set1_epi32(LOWEST ? 0 : x[b][g].offsets[0]);
        for (int w = 0; w < GROUP_WORDS; ++w) {
            const __m512i weights = integers(band.words.data()[g * GROUP_WORDS + w]);
            for (int b = 0; b < B; ++b) {
                int32_t word;
                std::memcpy(&word, x[b][g].values + 4 * w, sizeof word);
                total[b] = _mm512_dpbusd_epi32(total[b], weights, _mm512_set1_epi32(word));
            }
        }
        for (int b = 0; b < B; ++b) sums[b] = add_group<LOWEST>(sums[b], total[b], band, g, x[b][g]);
    }
    for (int b = 0; b < B; ++b) _mm512_mask_storeu_ps(to[b], there, sums[b]);
}

// Activations from the one at ``begin`` on with a band that was turned, B at once and the rest in halves.
template <int B, int BITS, bool LOWEST>
static inline void band_blocks(const Band16 &band, int64_t groups, const Rounded<BITS> *const *x, int64_t tokens,
                               __mmask16 there, float *const *to, int64_t begin) {
    int64_t b = 0;
    float *at[B];
    for (; b + B <= tokens; b += B) {
        for (int i = 0; i < B; ++i) at[i] = to[b + i] + begin;
        band_block<B, BITS, LOWEST>(band, groups, x + b, there, at);
    }
    if constexpr (B > 1) band_blocks<B / 2, BITS, LOWEST>(band, groups, x + b, tokens - b, there, to + b, begin);
}

// The integers of an activation as they lie beside 64 bytes of weights each; of 4 bits those of the lower halves, then
// those of the upper ones. Groups that are not there are zeros.
template <int BITS> static inline void lay_out(const Rounded<BITS> *x, int64_t groups, Line *planes) {
    constexpr int64_t PLANES = 8 / BITS, EACH = GROUP / PLANES, TOGETHER = 64 / EACH;
    std::memset(static_cast<void *>(planes), 0, (groups + TOGETHER - 1) / TOGETHER * PLANES * sizeof *planes);
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t p = 0; p < PLANES; ++p) {
            auto *to = reinterpret_cast<uint8_t *>(planes + g / TOGETHER * PLANES + p);
            std::memcpy(to + g % TOGETHER * EACH, x[g].values + p * EACH, EACH);
        }
}

static inline __m512i even_quarters(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
static inline __m512i odd_quarters(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }

// Partial sums of 16 rows, four to a quarter, become sums of a quarter each: a vector a quarter, its lanes rows.
static inline void add_quarters(const __m512i *rows, __m512i *sums) {
    __m512i fours[4];
    for (int i = 0; i < 4; ++i) {
        __m512i pairs[2];
        for (int j = 0; j < 2; ++j) {
            const __m512i a = rows[4 * i + 2 * j], b = rows[4 * i + 2 * j + 1];
            pairs[j] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        }
        const __m512i low = _mm512_unpacklo_epi64(pairs[0], pairs[1]), high = _mm512_unpackhi_epi64(pairs[0], pairs[1]);
        fours[i] = _mm512_add_epi32(low, high);
    }
    for (int odd = 0; odd < 2; ++odd) {
        const auto pick = [&](__m512i a, __m512i b) { return odd ? odd_quarters(a, b) : even_quarters(a, b); };
        const __m512i first = pick(fours[0], fours[1]), second = pick(fours[2], fours[3]);
        sums[odd] = even_quarters(first, second), sums[2 + odd] = odd_quarters(first, second);
    }
}

// One activation with a band: rows are not turned for it, their sums are. Integers of a group are the same.
template <int BITS, bool LOWEST>
static inline void band_alone(const uint8_t *from, int64_t groups, const uint8_t *next, const Band16 &band,
                              const Rounded<BITS> *x, __mmask16 there, float *to) {
    constexpr int64_t BYTES = GROUP * BITS / 8, EACH = 64 / BYTES;
    const int64_t stride = groups * BYTES;
    __m512 sums{};
    for (int64_t g = 0; g < groups; g += EACH) {
        const int64_t left = std::min<int64_t>(EACH, groups - g);
        const auto words = static_cast<__mmask16>((1u << (left * BYTES / 4)) - 1);
        const Line *active = band.beside.data() + g / EACH * (8 / BITS);
        __m512i rows[BAND_ROWS], quarters[4];
        fetch(next, BAND_ROWS * g * BYTES, BAND_ROWS * 64);
        for (int r = 0; r < BAND_ROWS; ++r) {
            const __m512i found = _mm512_maskz_loadu_epi32(words, from + r * stride + g * BYTES);
            const __m512i first = BITS == 8 ? raised(found) : lower(found);
            rows[r] = _mm512_dpbusd_epi32(__m512i{}, first, integers(active[0]));
            if constexpr (BITS == 4) rows[r] = _mm512_dpbusd_epi32(rows[r], upper(found), integers(active[1]));
        }
        add_quarters(rows, quarters);
        for (int64_t i = 0; i < left; ++i) {
            __m512i total = BITS == 8 ? _mm512_add_epi32(quarters[2 * i], quarters[2 * i + 1]) : quarters[i];
            if (!LOWEST) total = _mm512_add_epi32(total, _mm512_set1_epi32(x[g + i].offsets[0]));
            sums = add_group<LOWEST>(sums, total, band, g + i, x[g + i]);
        }
    }
    _mm512_mask_storeu_ps(to, there, sums);
}

// Puts the products of ``count`` rows with activation b into to[b].
template <int BITS, bool LOWEST>
static inline void products(Packed<BITS, LOWEST> rows, int64_t, int64_t count, const Rounded<BITS> *const *x,
                            int64_t tokens, float *const *to) {
    thread_local Band16 band;
    const int64_t groups = rows.groups;
    band.held.want(groups * GROUP_WORDS), band.words.want(groups * GROUP_WORDS);
    band.scales.want(groups), band.lowest.want(groups), band.beside.want(groups + 2);
    if (tokens == 1) lay_out<BITS>(x[0], groups, band.beside.data());
    for (int64_t begin = 0; begin < count; begin += BAND_ROWS) {
        const int64_t own = std::min(BAND_ROWS, count - begin);
        const auto there = static_cast<__mmask16>((1u << own) - 1);
        const uint8_t *next = rows.from(begin + BAND_ROWS).data, *from = open_band(rows.from(begin), own, band);
        if (tokens == 1) {
            band_alone<BITS, LOWEST>(from, groups, next, band, x[0], there, to[0] + begin);
            continue;
        }
        turn_band<BITS>(from, groups, next, band);
        band_blocks<8, BITS, LOWEST>(band, groups, x, tokens, there, to, begin);
    }
}
#endif
