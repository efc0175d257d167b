// What a call is given: tensors of any format, as the library's Python half fills them in (library.py).
#pragma once

#include <cstdint>

#include "products.h"

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

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
    const void *bias;  // [rows], of the same type; may be null
    int64_t rows, columns, type;
};

struct Norm {
    const void *weight;  // null: passes values on
    int64_t type;
    double epsilon;
};

// Adds rows [begin, end) of the product with every activation into ``out``, [tokens][width], bias included.
static inline void multiply(const Matrix &matrix, int64_t begin, int64_t end, const float *const *x,
                            int64_t tokens, float *out, int64_t width) {
    typed(matrix.data, matrix.type, [&](auto *data) {
        auto *bias = static_cast<decltype(data)>(matrix.bias);
        products(data + begin * matrix.columns, matrix.columns, matrix.columns, end - begin, x, tokens,
                 [&](int64_t row, int64_t b, float value) {
                     out[b * width + begin + row] = bias ? value + widen(bias[begin + row]) : value;
                 });
    });
}

static inline void normalise(const Norm &norm, const float *x, int64_t n, float *out) {
    if (!norm.weight) {
        if (out != x) std::memcpy(out, x, n * sizeof *x);
        return;
    }
    typed(norm.weight, norm.type, [&](auto *weight) {
        normalise(x, weight, n, static_cast<float>(norm.epsilon), out);
    });
}

static inline void read(const void *from, int64_t type, int64_t begin, int64_t n, float *to) {
    typed(from, type, [&](auto *data) {
        for (int64_t i = 0; i < n; ++i) to[i] = widen(data[begin + i]);
    });
}

static inline void write(const float *from, int64_t n, void *to, int64_t type, int64_t begin) {
    typed(to, type, [&](auto *data) {
        for (int64_t i = 0; i < n; ++i) narrow(from[i], data + begin + i);
    });
}
