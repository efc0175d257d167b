// What a call is given: tensors of any format, as the library's Python half fills them in (library.py).
#pragma once

#include <cstdint>

#include "products.h"

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

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
    const void *scales;  // of packed rows: one for each group of 32 columns, the last group filled with zeros
    const void *bias;    // [rows]; may be null
    int64_t rows, columns, type, bias_type;
};

// Calls use(rows) with the rows from ``first`` on, in the format that they have.
template <class Use> static inline void rows_of(const Matrix &matrix, int64_t first, Use &&use) {
    const int64_t groups = (matrix.columns + GROUP - 1) / GROUP;
    const auto *bytes = static_cast<const uint8_t *>(matrix.data);
    const auto *scales = static_cast<const Half *>(matrix.scales);
    switch (matrix.type) {
        case BFLOAT16:
            return use(Dense<Bfloat16>{static_cast<const Bfloat16 *>(matrix.data), matrix.columns}.from(first));
        case INT8: return use(Packed<8>{bytes, scales, groups}.from(first));
        case INT4: return use(Packed<4>{bytes, scales, groups}.from(first));
        default: return use(Dense<float>{static_cast<const float *>(matrix.data), matrix.columns}.from(first));
    }
}

struct Norm {
    const void *weight;  // null: passes values on
    int64_t type;
    double epsilon;
};

// Puts the products of rows [begin, end) with every activation into ``out``, [tokens][width], bias included.
static inline void multiply(const Matrix &matrix, int64_t begin, int64_t end, const float *const *x,
                            int64_t tokens, float *out, int64_t width) {
    rows_of(matrix, begin, [&](auto rows) {
        products(rows, matrix.columns, end - begin, x, tokens,
                 [&](int64_t row, int64_t b, float value) { out[b * width + begin + row] = value; });
    });
    if (!matrix.bias) return;
    typed(matrix.bias, matrix.bias_type, [&](auto *bias) {
        for (int64_t b = 0; b < tokens; ++b)
            for (int64_t row = begin; row < end; ++row) out[b * width + row] += widen(bias[row]);
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
