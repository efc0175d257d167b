// Activations rounded to 8-bit integers, a scale for each group of 32: sums of their products with the integers of
// packed rows are exact, and are scaled group by group (steps.h, or bands.h where the processor has VNNI).
//
// A step is what one vector of weights covers. Its lanes are partial sums of one group each; of a band, a step is one
// group and has one sum.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

#if defined(__AVX512VNNI__)
constexpr bool BANDED = true;
#else
constexpr bool BANDED = false;
#endif

// Bytes of the weights that a step reads, groups in them, and lanes of a group.
template <int BITS> constexpr int STEP_BYTES = BANDED || LANES == 4 ? GROUP * BITS / 8 : LANES * 4;
template <int BITS> constexpr int GROUPS = STEP_BYTES<BITS> * 8 / BITS / GROUP;
template <int BITS> constexpr int PARTS = BANDED ? 1 : LANES / GROUPS<BITS>;

// What is added to the sums of unsigned weights, whose values are this much less.
template <int BITS> constexpr int BIAS = BITS == 4 ? 8 : 128;

// A step of an activation: its integers in the order of the weights; for each lane minus the bias times the sum of
// its integers; for each group a scale, and that times a lane's share of the sum of all its integers.
template <int BITS> struct Rounded {
    int8_t values[GROUPS<BITS> * GROUP];
    int32_t offsets[GROUPS<BITS> * PARTS<BITS>];
    float scales[GROUPS<BITS>], wholes[GROUPS<BITS>];
};

template <int BITS> class Quantised {
  public:
    std::vector<Rounded<BITS> *> at;  // of each activation, its steps

    size_t size() const { return at.size(); }

    void reserve(int64_t tokens, int64_t n) {
        width = n;
        steps = ((n + GROUP - 1) / GROUP + GROUPS<BITS> - 1) / GROUPS<BITS>;
        held.want(tokens * steps);
        for (int64_t b = 0; b < tokens; ++b) at.push_back(held.data() + b * steps);
    }

    // The nearest integers, the largest of a group 127. What is not finite makes the group's scale not a number.
    void quantise(const float *x, int64_t b) {
        for (int64_t g = 0; g < steps * GROUPS<BITS>; ++g) {
            const int64_t have = std::clamp<int64_t>(width - g * GROUP, 0, GROUP);
            const float *from = x + g * GROUP;
            float part[GROUP];  // the last group, filled up
            if (have < GROUP) {
                std::fill(std::copy_n(from, have, part), part + GROUP, 0.0f);
                from = part;
            }
            int8_t rounded[GROUP];
            const float scale = round_group(from, rounded);
            place(rounded, scale, at[b][g / GROUPS<BITS>], g % GROUPS<BITS>);
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
        Integers most{};  // magnitudes as integers: what is not a number is above all of them
        for (int i = 0; i < GROUP; i += LANES) {
            const Integers bits = reinterpret_cast<Integers>(load(x + i)) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        int32_t largest = 0, near[GROUP];
        for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
        float peak;
        std::memcpy(&peak, &largest, sizeof peak);
        const float inverse = peak > 0 && peak <= 3e38f ? 127.0f / peak : 0.0f;
        for (int i = 0; i < GROUP; i += LANES) {
            const Integers bits = reinterpret_cast<Integers>(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
            std::memcpy(near + i, &bits, sizeof bits);
        }
        for (int i = 0; i < GROUP; ++i) rounded[i] = static_cast<int8_t>(near[i]);
        return peak <= 3e38f ? peak / 127.0f : NAN;
    }

    // Puts a group where the step reads it: of 4-bit weights all lower halves come first.
    static void place(const int8_t *rounded, float scale, Rounded<BITS> &step, int64_t inside) {
        int32_t *sums = step.offsets + inside * PARTS<BITS>, whole = 0;
        std::fill_n(sums, PARTS<BITS>, 0);
        if constexpr (BITS == 8) {
            std::memcpy(step.values + inside * GROUP, rounded, GROUP);
            for (int i = 0; i < GROUP; ++i) sums[i * PARTS<BITS> / GROUP] -= BIAS<8> * rounded[i];
        } else {
            std::memcpy(step.values + inside * 16, rounded, 16);
            std::memcpy(step.values + GROUPS<4> * 16 + inside * 16, rounded + 16, 16);
            for (int i = 0; i < GROUP; ++i) sums[i % 16 * PARTS<BITS> / 16] -= BIAS<4> * rounded[i];
        }
        for (int i = 0; i < GROUP; ++i) whole += rounded[i];
        step.scales[inside] = scale;
        step.wholes[inside] = static_cast<float>(whole) * scale / PARTS<BITS>;
    }

    int64_t width = 0, steps = 0;
    Buffer<Rounded<BITS>> held;
};
