// New tokens' attention over cached rows: heads that read the same rows, a span of slots at a time.
//
// Spans are at fixed places, each found by itself and merged in their order, so that neither pages nor neighbours nor
// threads change a value.
//
// Legend: B heads at once, L slots of a span, K width of a key, V width of a value.
#pragma once

#include <algorithm>

#include "pairs.h"
#include "tiles.h"

constexpr int64_t SPAN = 256;                     // L: rows that stay in the second cache from keys to values
constexpr int64_t TOGETHER = PAIRED ? TILE : 4;   // heads of a unit of work at most
constexpr int64_t CROWD = TILED ? 1 : 8;          // heads from which on they are worth the lanes of a tile

// Where the cached rows of one sequence are: slot j is row j % slots of page table[j / slots].
template <class T> struct Slots {
    const T *storage;
    const int64_t *table;  // nullptr: one page
    int64_t page, row, slots;

    const T *at(int64_t slot) const {
        if (!table) return storage + slot * row;
        return storage + table[slot / slots] * page + slot % slots * row;
    }
    // How many slots from ``slot`` on lie in one page, at most ``most``.
    int64_t together(int64_t slot, int64_t most) const {
        return table ? std::min(most, slots - slot % slots) : most;
    }
};

struct Heads {
    const float *queries;  // [B][K], scaled
    int64_t count;
    int64_t key, value;  // where keys and values begin in a row
    int64_t key_width, value_width;
    float softcap;  // 0: none

    // What is found in a span: V values that are not yet divided, the largest logit, and the sum of shares.
    int64_t found_width() const { return value_width + 2; }
};

// Exponentials of logits against their largest; returns their sum.
static inline float shares_of(float *logits, int64_t count, float largest) {
    int64_t i = 0;
    Vector total{};
    for (; i + LANES <= count; i += LANES) {
        const Vector share = exponential(load(logits + i) - largest);
        store(logits + i, share);
        total += share;
    }
    float rest = 0;
    for (; i < count; ++i) rest += logits[i] = exponential(logits[i] - largest);
    return sum(total) + rest;
}

// Logits of a head become shares; the largest and the sum go behind its values.
static inline void settle(const Heads &heads, float *logits, int64_t count, float *found) {
    for (int64_t i = 0; i < count && heads.softcap > 0; ++i)
        logits[i] = heads.softcap * std::tanh(logits[i] / heads.softcap);
    const float largest = largest_of(logits, count);
    found[heads.value_width] = largest;
    found[heads.value_width + 1] = shares_of(logits, count, largest);
}

template <int B, class T>
static inline void attend_few(const Heads &heads, const Slots<T> &slots, int64_t first, int64_t count, float *found) {
    alignas(64) float logits[B][SPAN];
    const float *queries[B], *shares[B];
    float *to[B];
    for (int b = 0; b < B; ++b) queries[b] = heads.queries + b * heads.key_width;
    for (int64_t done = 0; done < count;) {
        const int64_t run = slots.together(first + done, count - done);
        for (int b = 0; b < B; ++b) to[b] = logits[b] + done;
        products_of<B>(Dense<T>{slots.at(first + done) + heads.key, slots.row}, heads.key_width, run, queries, to);
        done += run;
    }
    for (int b = 0; b < B; ++b) {
        to[b] = found + b * heads.found_width();
        settle(heads, logits[b], count, to[b]);
        std::fill_n(to[b], heads.value_width, 0.0f);
    }
    for (int64_t done = 0; done < count;) {
        const int64_t run = slots.together(first + done, count - done);
        for (int b = 0; b < B; ++b) shares[b] = logits[b] + done;
        mix<B>(slots.at(first + done) + heads.value, slots.row, heads.value_width, run, shares, to);
        done += run;
    }
}

#if defined(__AVX512BF16__)
// Values of two slots after the other, [L / 2][V][2], as tiles read them: zeros beyond the last.
static inline void pair_values(const Heads &heads, const Slots<Bfloat16> &slots, int64_t first, int64_t count,
                               int64_t width, Bfloat16 *to) {
    const auto pair = [&](const Bfloat16 *even, __mmask16 in_even, const Bfloat16 *odd, __mmask16 in_odd) {
        return side_by_side(sixteen(even, in_even), sixteen(odd, in_odd));
    };
    const Bfloat16 *rows[SPAN];
    for (int64_t done = 0; done < count;) {
        const int64_t run = slots.together(first + done, count - done);
        const Bfloat16 *begin = slots.at(first + done) + heads.value;
        for (int64_t i = 0; i < run; ++i) rows[done + i] = begin + i * slots.row;
        done += run;
    }
    const int64_t whole = heads.value_width / 16 * 16;
    const auto rest = static_cast<__mmask16>((1u << (heads.value_width - whole)) - 1);
    for (int64_t slot = 0; slot < (count + 31) / 32 * 32; slot += 2, to += 2 * width) {
        const __mmask16 even_there = slot < count ? 0xffff : 0, odd_there = slot + 1 < count ? 0xffff : 0;
        const Bfloat16 *even = rows[even_there ? slot : 0], *odd = rows[odd_there ? slot + 1 : 0];
        for (int64_t i = 0; i < whole; i += 16)
            _mm512_storeu_si512(to + 2 * i, pair(even + i, even_there, odd + i, odd_there));
        if (rest)
            _mm512_storeu_si512(to + 2 * whole, pair(even + whole, even_there & rest, odd + whole, odd_there & rest));
    }
}

// Values of up to 16 heads, whose shares are rows [16][L], of values in pairs [L / 2][V][2].
static inline void mix_pairs(const Heads &heads, const Bfloat16 *shares, const Bfloat16 *pairs, int64_t count,
                             int64_t width, float *found) {
#if defined(__AMX_BF16__)
    set_tiles(TILE);
    alignas(64) float sums[TILE * TILE];
    for (int64_t i = 0; i < heads.value_width; i += TILE) {
        _tile_zero(0);
        for (int64_t k = 0; k * TILE_VALUES < count; ++k) {
            _tile_loadd(4, shares + k * TILE_VALUES, SPAN * 2);
            _tile_loadd(6, pairs + (k * TILE * width + i) * 2, static_cast<int>(width * 4));
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, sums, 64);
        for (int64_t b = 0; b < heads.count; ++b)
            std::copy_n(sums + b * TILE, std::min(TILE, heads.value_width - i), found + b * heads.found_width() + i);
    }
#else
    alignas(64) float sums[HELD][2 * TILE];
    for (int64_t first = 0; first < heads.count; first += HELD)
        for (int64_t i = 0; i < heads.value_width; i += 2 * TILE) {
            pair_shares(shares + first * SPAN, SPAN, pairs + 2 * i, 2 * width, (count + 1) / 2, sums);
            for (int64_t b = first; b < std::min(first + HELD, heads.count); ++b)
                std::copy_n(sums[b - first], std::min(2 * TILE, heads.value_width - i),
                            found + b * heads.found_width() + i);
        }
#endif
}

// Up to 16 heads together: keys are read where they lie, shares of heads are rows, and values come in pairs.
static inline void attend_tiles(const Heads &heads, const Slots<Bfloat16> &slots, int64_t first, int64_t count,
                                float *found) {
    const int64_t width = tile_width(heads.value_width), wide = tile_width(heads.key_width);
    thread_local Buffer<Bfloat16> queries, pairs, shares;
    thread_local Buffer<float> logits;
    queries.want(TILE * wide), pairs.want(SPAN * width), shares.want(TILE * SPAN), logits.want(TILE * SPAN);
    const float *from[TILE];
    float *to[TILE];
    for (int64_t b = 0; b < heads.count; ++b) from[b] = heads.queries + b * heads.key_width;
    pack_tiles(from, heads.count, heads.key_width, queries.data());
    for (int64_t done = 0; done < count;) {
        const int64_t run = slots.together(first + done, count - done);
        for (int64_t b = 0; b < heads.count; ++b) to[b] = logits.data() + b * SPAN + done;
        const Dense<Bfloat16> rows{slots.at(first + done) + heads.key, slots.row};
        tile_products(rows, heads.key_width, run, queries.data(), heads.count, to);
        done += run;
    }
    std::memset(static_cast<void *>(shares.data()), 0, TILE * SPAN * sizeof(Bfloat16));
    for (int64_t b = 0; b < heads.count; ++b) {
        settle(heads, logits.data() + b * SPAN, count, found + b * heads.found_width());
        narrow_row(logits.data() + b * SPAN, count, shares.data() + b * SPAN);
    }
    pair_values(heads, slots, first, count, width, pairs.data());
    mix_pairs(heads, shares.data(), pairs.data(), count, width, found);
}
#endif

// What ``heads`` find in slots [first, first + count), for each its values, the largest logit and the sum of shares.
template <class T>
static inline void attend_span(const Heads &heads, const Slots<T> &slots, int64_t first, int64_t count, float *found) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(Bfloat16))
        if (heads.count >= CROWD) return attend_tiles(heads, slots, first, count, found);
#endif
    Heads some = heads;
    int64_t b = 0;
    const auto next = [&](int64_t taken) {
        b += taken, found += taken * heads.found_width(), some.queries += taken * heads.key_width;
    };
    for (; b + 4 <= heads.count; next(4)) attend_few<4>(some, slots, first, count, found);
    switch (heads.count - b) {
        case 3: return attend_few<3>(some, slots, first, count, found);
        case 2: return attend_few<2>(some, slots, first, count, found);
        case 1: return attend_few<1>(some, slots, first, count, found);
    }
}

// The values of one head, out of what it found in ``spans`` spans, ``stride`` apart.
static inline void merge_spans(const float *found, int64_t stride, int64_t spans, int64_t width, float *to) {
    float largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < spans; ++s) largest = std::max(largest, found[s * stride + width]);
    std::fill_n(to, width, 0.0f);
    for (int64_t s = 0; s < spans; ++s) {
        const float *part = found + s * stride, share = exponential(part[width] - largest);
        total += share * part[width + 1];
        for (int64_t i = 0; i < width; ++i) to[i] += share * part[i];
    }
    for (int64_t i = 0; i < width; ++i) to[i] /= total;
}
