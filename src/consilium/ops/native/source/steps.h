// Products of packed rows with rounded activations, row by row: a vector of weights at once.
#pragma once

#include "integers.h"

#if !defined(__AVX512VNNI__)
// The weights of a step, ready to be multiplied, of which ``bytes`` belong to the row.
template <int BITS> struct Step {
#if defined(__AVX2__)
    __m256i planes[8 / BITS];

    Step(const uint8_t *from, int64_t bytes) {
        const auto *at = reinterpret_cast<const __m128i *>(from);
        const __m256i found = bytes >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))
                                          : _mm256_zextsi128_si256(_mm_loadu_si128(at));
        if constexpr (BITS == 8) {
            planes[0] = found;
        } else {
            planes[0] = _mm256_and_si256(found, _mm256_set1_epi8(15));
            planes[1] = _mm256_and_si256(_mm256_srli_epi16(found, 4), _mm256_set1_epi8(15));
        }
    }

    // Pairs of products are 16 bits wide, and would saturate beyond 32767: unsigned weights of 4 bits make 3810,
    // and weights of 8 bits 32512 once their signs are the activations'.
    Vector sums(const int8_t *x, const int32_t *offsets) const {
        const __m256i ones = _mm256_set1_epi16(1);
        const auto active = [&](int p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + p * 32)); };
        if constexpr (BITS == 8) {
            const __m256i signed_x = _mm256_sign_epi8(active(0), planes[0]);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(planes[0]), signed_x);
            return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones)));
        } else {
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(planes[0], active(0)),
                                                   _mm256_maddubs_epi16(planes[1], active(1)));
            const __m256i offset = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(offsets));
            const __m256i total = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), offset);
            return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(total));
        }
    }

    static Vector spread_scales(const float *scales) {
        if constexpr (BITS == 8) return spread(scales[0]);
        return reinterpret_cast<Vector>(_mm256_setr_m128(_mm_set1_ps(scales[0]), _mm_set1_ps(scales[1])));
    }
#else
    const uint8_t *from;

    Step(const uint8_t *from, int64_t) : from(from) {}

    Vector sums(const int8_t *x, const int32_t *) const {
        int32_t lanes[LANES] = {};
        for (int i = 0; i < STEP_BYTES<BITS>; ++i)
            if constexpr (BITS == 8)
                lanes[i / 8] += static_cast<int8_t>(from[i]) * x[i];
            else
                lanes[i / 4] += ((from[i] & 15) - 8) * x[i] + ((from[i] >> 4) - 8) * x[16 + i];
        Integers found;
        for (int i = 0; i < LANES; ++i) found[i] = lanes[i];
        return __builtin_convertvector(found, Vector);
    }

    static Vector spread_scales(const float *scales) { return spread(scales[0]); }
#endif
};

template <int R, int B, int BITS, bool LOWEST>
static inline void dots(Packed<BITS, LOWEST> rows, int64_t, const Rounded<BITS> *const *x, float (*out)[B]) {
    constexpr int BYTES = GROUP * BITS / 8, CHUNK = 32;  // groups whose scales are widened at once
    constexpr int64_t EACH = GROUPS<BITS>;
    float scales[R][CHUNK + EACH], added[R][CHUNK + EACH];
    Vector sums[R][B] = {};
    for (int64_t first = 0; first < rows.groups; first += CHUNK) {
        const int64_t count = std::min<int64_t>(CHUNK, rows.groups - first);
        for (int r = 0; r < R; ++r) {
            rows.from(r).widen_scales(first, count, scales[r], added[r]);
            std::fill_n(scales[r] + count, EACH, 0.0f);
            if (LOWEST) std::fill_n(added[r] + count, EACH, 0.0f);
        }
        for (int64_t g = 0; g < count; g += EACH) {
            const int64_t at = first + g;
            Vector active[B], whole[B];
            for (int b = 0; b < B; ++b) {
                active[b] = Step<BITS>::spread_scales(x[b][at / EACH].scales);
                if (LOWEST) whole[b] = Step<BITS>::spread_scales(x[b][at / EACH].wholes);
            }
            for (int r = 0; r < R; ++r) {
                const uint8_t *weights = rows.data + (r * rows.groups + at) * BYTES;
                if (g % (64 / BYTES) == 0) __builtin_prefetch(weights + AHEAD_ROWS * rows.groups * BYTES, 0, 2);
                const Step<BITS> step(weights, (rows.groups - at) * BYTES);
                const Vector scale = Step<BITS>::spread_scales(scales[r] + g);
                for (int b = 0; b < B; ++b)
                    sums[r][b] += step.sums(x[b][at / EACH].values, x[b][at / EACH].offsets) * scale * active[b];
                if (LOWEST) {
                    const Vector more = Step<BITS>::spread_scales(added[r] + g);
                    for (int b = 0; b < B; ++b) sums[r][b] += more * whole[b];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) out[r][b] = sum(sums[r][b]);
}
#endif
