// Products with a matrix of any format: the only place where its format and the way are matched.
#include "bands.h"
#include "pairs.h"
#include "panels.h"
#include "steps.h"
#include "tiles.h"
#include "values.h"

namespace {

// Calls use(rows) with the rows from ``first`` on, in the format that they have.
template <class Use> void rows_of(const Matrix &matrix, int64_t first, Use &&use) {
    const int64_t groups = (matrix.columns + GROUP - 1) / GROUP;
    const auto *bytes = static_cast<const uint8_t *>(matrix.data);
    const auto *scales = static_cast<const Half *>(matrix.scales);
    switch (matrix.type) {
        case BFLOAT16:
            return use(Dense<Bfloat16>{static_cast<const Bfloat16 *>(matrix.data), matrix.columns}.from(first));
        case INT8: return use(Packed<8>{bytes, scales, groups}.from(first));
        case INT4: return use(Packed<4>{bytes, scales, groups}.from(first));
        case UINT4: return use(Packed<4, true>{bytes, scales, groups}.from(first));
        case FLOAT8:
            return use(Float8{bytes, static_cast<const float *>(matrix.scales), matrix.columns}.from(first));
        default: return use(Dense<float>{static_cast<const float *>(matrix.data), matrix.columns}.from(first));
    }
}

template <class T> const float *const *integers_of(Dense<T>, const Active &x) { return x.at.data(); }
const float *const *integers_of(Float8, const Active &x) { return x.at.data(); }
const Rounded<8> *const *integers_of(Packed<8>, const Active &x) { return x.eight.at.data(); }
template <bool LOWEST>
const Rounded<4> *const *integers_of(Packed<4, LOWEST>, const Active &x) { return x.four.at.data(); }

}  // namespace

void multiply(const Matrix &matrix, int64_t begin, int64_t end, Way way, const Active &x,
                            float *const *to) {
    rows_of(matrix, begin, [&](auto rows) {
        switch (way) {
            case TILES:
                return tile_products(rows, x.width, end - begin, x.tiles.data(), x.tokens(), to);
            case PANELS:
                return panel_products(rows, x.width, end - begin, x.panels.data(), x.tokens(), to);
            default: return products(rows, x.width, end - begin, integers_of(rows, x), x.tokens(), to);
        }
    });
    if (!matrix.bias) return;
    typed(matrix.bias, matrix.bias_type, [&](auto *bias) {
        for (int64_t b = 0; b < x.tokens(); ++b)
            for (int64_t row = begin; row < end; ++row) to[b][row - begin] += widen(bias[row]);
    });
}
