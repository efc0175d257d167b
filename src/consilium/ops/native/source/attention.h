// One new token's attention over cached rows, of a few heads that read the same rows.
//
// Slots are taken in tiles at fixed places and merged in order by their largest logit, so that neither pages
// nor neighbours change a value.
//
// Legend: B heads at once, L slots, K width of a key, V width of a value.
#pragma once

#include <algorithm>

#include "products.h"

constexpr int64_t SPAN = 256;  // slots whose rows stay in the second cache from keys to values
constexpr int HEADS = 4;       // most at once

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
    const float *const *queries;  // [B] of K values, scaled
    float *const *values;         // [B] of V sums, written
    int64_t key, value;           // where keys and values begin in a row
    int64_t key_width, value_width;
    float softcap;  // 0: none
};

// Logits of a tile for every head.
template <int B, class T>
static inline void logits_of(const Heads &heads, const Slots<T> &slots, int64_t first, int64_t count,
                             float (*logits)[SPAN]) {
    for (int64_t done = 0; done < count;) {
        const int64_t run = slots.together(first + done, count - done);
        const T *rows = slots.at(first + done) + heads.key;
        float *to[B];
        for (int b = 0; b < B; ++b) to[b] = logits[b] + done;
        products_of<B>(Dense<T>{rows, slots.row}, heads.key_width, run, heads.queries, to);
        done += run;
    }
    for (int b = 0; b < B && heads.softcap > 0; ++b)
        for (int64_t i = 0; i < count; ++i) logits[b][i] = heads.softcap * std::tanh(logits[b][i] / heads.softcap);
}

// Exponentials of a tile's logits against the largest so far, which may rise; returns their sum.
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

template <int B, class T> static inline void attend(const Heads &heads, const Slots<T> &slots, int64_t length) {
    alignas(64) float logits[B][SPAN];
    float largest[B], total[B];
    const float *shares[B];
    for (int b = 0; b < B; ++b) {
        largest[b] = -INFINITY, total[b] = 0;
        std::fill_n(heads.values[b], heads.value_width, 0.0f);
    }
    for (int64_t first = 0; first < length; first += SPAN) {
        const int64_t count = std::min(SPAN, length - first);
        logits_of<B>(heads, slots, first, count, logits);
        for (int b = 0; b < B; ++b) {
            const float before = largest[b];
            largest[b] = std::max(before, largest_of(logits[b], count));
            const float shrunk = first ? exponential(before - largest[b]) : 0.0f;
            total[b] = total[b] * shrunk + shares_of(logits[b], count, largest[b]);
            if (first && shrunk != 1.0f)
                for (int64_t i = 0; i < heads.value_width; ++i) heads.values[b][i] *= shrunk;
        }
        for (int64_t done = 0; done < count;) {
            const int64_t run = slots.together(first + done, count - done);
            for (int b = 0; b < B; ++b) shares[b] = logits[b] + done;
            mix<B>(slots.at(first + done) + heads.value, slots.row, heads.value_width, run, shares, heads.values);
            done += run;
        }
    }
    for (int b = 0; b < B; ++b)
        for (int64_t i = 0; i < heads.value_width; ++i) heads.values[b][i] /= total[b];
}

// Any number of heads, a few at a time.
template <class T>
static inline void attend_heads(const Heads &heads, int64_t count, const Slots<T> &slots, int64_t length) {
    Heads some = heads;
    int64_t b = 0;
    for (; b + HEADS <= count; b += HEADS) {
        some.queries = heads.queries + b, some.values = heads.values + b;
        attend<HEADS>(some, slots, length);
    }
    for (; b < count; ++b) {
        some.queries = heads.queries + b, some.values = heads.values + b;
        attend<1>(some, slots, length);
    }
}
