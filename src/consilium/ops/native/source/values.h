// What a call is given: tensors of any format, as the library's Python half fills them in (library.py).
#pragma once

#include <cstdint>

#include "active.h"

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, FLOAT8 = 4, UINT4 = 5 };

// Bytes of a value of a type that is not packed.
static inline int64_t size_of(int64_t type) { return type == BFLOAT16 ? 2 : 4; }

// Calls use(pointer) with the type that ``data`` has.
template <class Use> static inline auto typed(const void *data, int64_t type, Use &&use) {
    return type == BFLOAT16 ? use(static_cast<const Bfloat16 *>(data)) : use(static_cast<const float *>(data));
}
template <class Use> static inline auto typed(void *data, int64_t type, Use &&use) {
    return type == BFLOAT16 ? use(static_cast<Bfloat16 *>(data)) : use(static_cast<float *>(data));
}

// One row after the other; absent where ``data`` is null.
struct Matrix {
    const void *data;
    const void *scales;  // of packed rows: one for each group of 32 columns, the last group filled up; behind those
                         // of a row of UINT4 the lowest value of each group; of FLOAT8 one for each 128 columns
    const void *bias;    // [rows]; may be null
    int64_t rows, columns, type, bias_type;
};

struct Norm {
    const void *weight;  // null: passes values on
    int64_t type;
    double epsilon;
};

// How products whose activations stay float32 are taken: a prompt's always alike, wherever it is cut and however few
// of its tokens an expert has.
static inline Way exact_way(const Active &x) { return x.many ? PANELS : FLOATS; }

// How products with a matrix of this type are taken.
static inline Way way_of(int64_t type, const Active &x) {
    const bool packed = type == INT8 || type == INT4 || type == UINT4;
    if (TILED && type == BFLOAT16) return TILES;
    if (PAIRED && x.many && type != FLOAT32 && (TILED || !packed)) return TILES;
    if (!packed || (!BANDED && x.many)) return exact_way(x);
    return type == INT8 ? INTEGERS8 : INTEGERS4;
}

// Puts the products of rows [begin, end) with activation b, packed for ``way``, into to[b], bias included.
void multiply(const Matrix &matrix, int64_t begin, int64_t end, Way way, const Active &x, float *const *to);

static inline void normalise(const Norm &norm, const float *x, int64_t n, float *out) {
    if (!norm.weight) {
        if (out != x) std::memcpy(out, x, n * sizeof *x);
        return;
    }
    typed(norm.weight, norm.type, [&](auto *weight) {
        normalise(x, weight, n, static_cast<float>(norm.epsilon), out);
    });
}

static inline void write(const float *from, int64_t n, void *to, int64_t type, int64_t begin) {
    typed(to, type, [&](auto *data) { narrow_row(from, n, data + begin); });
}
