// Products of packed rows with activations rounded to 8-bit integers, a scale for each group of 32: sums of
// integers are exact, and are scaled group by group.
//
// A step is what one vector of weights covers. Its lanes are partial sums of one group each.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

// Bytes of the weights that a step reads, groups in them, and lanes of a group.
template <int BITS> constexpr int STEP_BYTES = LANES == 4 ? GROUP * BITS / 8 : LANES * 4;
template <int BITS> constexpr int GROUPS = STEP_BYTES<BITS> * 8 / BITS / GROUP;
template <int BITS> constexpr int PARTS = LANES / GROUPS<BITS>;

// What is added to the sums of unsigned weights, whose values are this much less.
template <int BITS> constexpr int BIAS = BITS == 4 ? 8 : 128;

// One activation: its integers in the order of the weights, a scale a group, and for each lane of a step minus the
// bias times the sum of its integers.
struct Rounded {
    const int8_t *values;
    const float *scales;
    const int32_t *offsets;
};

template <int BITS> class Quantised {
  public:
    std::vector<Rounded> at;

    size_t size() const { return at.size(); }

    void reserve(int64_t tokens, int64_t n) {
        width = n;
        groups = ((n + GROUP - 1) / GROUP + GROUPS<BITS> - 1) / GROUPS<BITS> * GROUPS<BITS>;
        values.want(tokens * groups * GROUP), scales.want(tokens * groups);
        offsets.want(tokens * groups * PARTS<BITS>);
        for (int64_t b = 0; b < tokens; ++b)
            at.push_back({values.data() + b * groups * GROUP, scales.data() + b * groups,
                          offsets.data() + b * groups * PARTS<BITS>});
    }

    // The nearest integers, the largest of a group 127. What is not finite makes the group's scale not a number.
    void quantise(const float *x, int64_t b) {
        for (int64_t g = 0; g < groups; ++g) {
            float group[GROUP] = {};
            const int64_t have = std::min<int64_t>(GROUP, width - g * GROUP);
            if (have > 0) std::memcpy(group, x + g * GROUP, have * sizeof(float));
            int8_t rounded[GROUP];
            scales.data()[b * groups + g] = round_group(group, rounded);
            place(rounded, b, g);
        }
    }

    Quantised some(const std::vector<int64_t> &places) const {
        Quantised found;
        for (const int64_t place : places)
            if (at.size()) found.at.push_back(at[place]);
        return found;
    }

  private:
    static float round_group(const float *x, int8_t *rounded) {
        uint32_t largest = 0;
        for (int i = 0; i < GROUP; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, sizeof bits);
            largest = std::max(largest, bits & 0x7fffffffu);
        }
        float peak;
        std::memcpy(&peak, &largest, sizeof peak);
        const float inverse = peak > 0 && peak <= 3e38f ? 127.0f / peak : 0.0f;
        for (int i = 0; i < GROUP; ++i) {
            const float shifted = x[i] * inverse + 12582912.0f;
            int32_t bits;
            std::memcpy(&bits, &shifted, sizeof bits);
            rounded[i] = static_cast<int8_t>(bits - 0x4b400000);
        }
        return peak <= 3e38f ? peak / 127.0f : NAN;
    }

    // Puts a group where the step reads it: of 4-bit weights all lower halves come first.
    void place(const int8_t *rounded, int64_t b, int64_t g) {
        const int64_t step = g / GROUPS<BITS>, inside = g % GROUPS<BITS>;
        int8_t *to = values.data() + (b * groups + step * GROUPS<BITS>) * GROUP;
        int32_t *sums = offsets.data() + (b * groups + g) * PARTS<BITS>;
        std::fill_n(sums, PARTS<BITS>, 0);
        if constexpr (BITS == 8) {
            std::memcpy(to + inside * GROUP, rounded, GROUP);
            for (int i = 0; i < GROUP; ++i) sums[i * PARTS<BITS> / GROUP] -= BIAS<8> * rounded[i];
        } else {
            std::memcpy(to + inside * 16, rounded, 16);
            std::memcpy(to + GROUPS<4> * 16 + inside * 16, rounded + 16, 16);
            for (int i = 0; i < GROUP; ++i) sums[i % 16 * PARTS<BITS> / 16] -= BIAS<4> * rounded[i];
        }
    }

    int64_t width = 0, groups = 0;
    Buffer<int8_t> values;
    Buffer<float> scales;
    Buffer<int32_t> offsets;
};

// The weights of a step, ready to be multiplied, of which ``bytes`` belong to the row.
template <int BITS> struct Step {
#if defined(__AVX512VNNI__)
    __m512i planes[8 / BITS];

    Step(const uint8_t *from, int64_t bytes) {
        const __mmask64 there = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
        const __m512i found = _mm512_maskz_loadu_epi8(there, from);
        if constexpr (BITS == 8) {
            planes[0] = _mm512_xor_si512(found, _mm512_set1_epi8(static_cast<char>(0x80)));
        } else {
            planes[0] = _mm512_and_si512(found, _mm512_set1_epi8(15));
            planes[1] = _mm512_and_si512(_mm512_srli_epi16(found, 4), _mm512_set1_epi8(15));
        }
    }

    Vector sums(const int8_t *x, const int32_t *offsets) const {
        __m512i total = _mm512_loadu_si512(offsets);
        for (int p = 0; p < 8 / BITS; ++p)
            total = _mm512_dpbusd_epi32(total, planes[p], _mm512_loadu_si512(x + p * 64));
        return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(total));
    }

    // A scale for each lane.
    static Vector spread_scales(const float *scales) {
        if constexpr (BITS == 8) {
            const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            const __m128 two = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double *>(scales)));
            return reinterpret_cast<Vector>(_mm512_permutexvar_ps(pick, _mm512_castps128_ps512(two)));
        } else {
            const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            const __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(scales));
            return reinterpret_cast<Vector>(_mm512_permutexvar_ps(pick, four));
        }
    }
#elif defined(__AVX2__)
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

// The sums of an activation's integers for each lane of a step, of which ``offsets`` are minus BIAS times as much.
template <int BITS> static inline Vector lane_sums(const int32_t *offsets) {
    Integers found;
    std::memcpy(&found, offsets, sizeof found);
    return __builtin_convertvector(found, Vector) * (-1.0f / BIAS<BITS>);
}

template <int R, int B, int BITS, bool LOWEST>
static inline void dots(Packed<BITS, LOWEST> rows, int64_t, const Rounded *x, float (*out)[B]) {
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
            Vector active[B];
            for (int b = 0; b < B; ++b) active[b] = Step<BITS>::spread_scales(x[b].scales + at);
            Vector whole[B];  // sums of the activations themselves
            if (LOWEST)
                for (int b = 0; b < B; ++b)
                    whole[b] = lane_sums<BITS>(x[b].offsets + at * PARTS<BITS>) * active[b];
            for (int r = 0; r < R; ++r) {
                const uint8_t *weights = rows.data + (r * rows.groups + at) * BYTES;
                if (g % (64 / BYTES) == 0) __builtin_prefetch(weights + R * rows.groups * BYTES);
                const Step<BITS> step(weights, (rows.groups - at) * BYTES);
                const Vector scale = Step<BITS>::spread_scales(scales[r] + g);
                for (int b = 0; b < B; ++b)
                    sums[r][b] += step.sums(x[b].values + at * GROUP, x[b].offsets + at * PARTS<BITS>) * scale * active[b];
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
