// Values of every token of a call, and what is done with all of them.
#pragma once

#include <utility>
#include <vector>

#include "attention.h"
#include "layers.h"
#include "pool.h"

// Rows of a matrix that a thread takes at once. Of few tokens as many as leave each thread two pieces, since what is
// fetched ahead ends with a piece; of many, and of those that tiles take, what leaves the second cache room.
static inline int64_t piece_of(int64_t rows, int64_t threads, bool many) {
    constexpr int64_t LEAST = 64, MOST = 256;
    if (TILED || many) return LEAST;
    const int64_t share = (rows + 2 * threads - 1) / (2 * threads);
    return std::clamp((share + TILE - 1) / TILE * TILE, LEAST, MOST);
}

// Values of every token, one row after the other.
struct Rows {
    Buffer<float> data;
    Active active;
    std::vector<float *> at;

    Rows(const Pass &p, int64_t width) : data(p.tokens * width), active(data.data(), p.tokens, width, p.many) {
        for (int64_t b = 0; b < p.tokens; ++b) at.push_back(data.data() + b * width);
    }
    float *operator[](int64_t b) { return at[b]; }
    int64_t width() const { return active.width; }
};

using Product = std::pair<const Matrix *, Rows *>;

// Products of the same activations with several matrices, shared among the threads.
static inline void multiply_all(Team::Member &member, std::initializer_list<Product> products, Rows &x) {
    int64_t pieces = 0, rows = 0;
    bool packed[WAYS] = {};
    for (auto &[matrix, out] : products) {
        const Way way = way_of(matrix->type, x.active);
        if (!std::exchange(packed[way], true)) pack(member, way, x.active);
    }
    for (auto &[matrix, out] : products) rows += matrix->rows;
    const int64_t each = piece_of(rows, member.threads(), x.active.many);
    for (auto &[matrix, out] : products) pieces += (matrix->rows + each - 1) / each;
    member.loop(pieces, 1, [&](int64_t piece, int64_t) {
        for (auto &[matrix, out] : products) {
            const int64_t own = (matrix->rows + each - 1) / each;
            if (piece < own) {
                const int64_t begin = piece * each, end = std::min(begin + each, matrix->rows);
                std::vector<float *> to(out->at);
                for (float *&at : to) at += begin;
                return multiply(*matrix, begin, end, way_of(matrix->type, x.active), x.active, to.data());
            }
            piece -= own;
        }
    });
}

// Which sequence a token is of.
static inline int64_t sequence(const Pass &p, int64_t b) { return p.many ? 0 : b; }

template <class T> static inline Slots<T> slots_of(const Pass &p, const Attend &a, int64_t b) {
    auto *storage = static_cast<const T *>(a.storage);
    if (a.table) return {storage, a.table + sequence(p, b) * a.table_width, a.page, a.row, a.slots};
    return {storage + sequence(p, b) * a.page, nullptr, a.page, a.row, a.slots};
}

// Where the row of a new token is to be written, as an index of the storage.
static inline int64_t place(const Pass &p, const Attend &a, int64_t b) {
    const int64_t slot = p.position[b], own = sequence(p, b);
    if (!a.table) return own * a.page + slot * a.row;
    return a.table[own * a.table_width + slot / a.slots] * a.page + slot % a.slots * a.row;
}

// The first slot that a token sees.
static inline int64_t first_seen(const Pass &p, const Attend &a, int64_t b) {
    return a.window ? std::max<int64_t>(0, p.position[b] + 1 - a.window) : 0;
}

// Attention of a part of a prompt over the cached rows that each of its tokens sees: ``q`` into ``mixed``.
void attend_prompt(const Pass &pass, const Attend &call, bool latent, Rows &q, Rows &mixed);
