// A cached row of latent attention in 8 bits: the twin of consilium/kv/rows.py, byte for byte.
//
// Z integers, the rotated key in bfloat16, and in bfloat16 what the integers are multiplied by.
//
// Legend: Z rank of the latent, R width of the rotated key.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

static inline void put_latent(const float *from, int64_t rank, int64_t rotated, int8_t *to) {
    float largest = 0;
    for (int64_t i = 0; i < rank; ++i) {
        const float size = std::fabs(from[i]);
        largest = size <= largest || std::isnan(largest) ? largest : size;  // none is larger than what is no number
    }
    Bfloat16 scale;
    narrow(largest / 127.0f, &scale);
    const float step = widen(scale);
    for (int64_t i = 0; i < rank; ++i) {
        const float share = std::nearbyint(from[i] / step);
        to[i] = step == 0 || std::isnan(share) ? 0 : static_cast<int8_t>(std::clamp(share, -127.0f, 127.0f));
    }
    for (int64_t i = 0; i < rotated; ++i) {
        Bfloat16 value;
        narrow(from[rank + i], &value);
        std::memcpy(to + rank + 2 * i, &value, sizeof value);
    }
    std::memcpy(to + rank + 2 * rotated, &scale, sizeof scale);
}

// Row ``from`` again, in float32 or rounded to bfloat16.
template <class T> static inline void get_latent(const int8_t *from, int64_t rank, int64_t rotated, T *to) {
    Bfloat16 scale;
    std::memcpy(&scale, from + rank + 2 * rotated, sizeof scale);
    const float step = widen(scale);
    for (int64_t i = 0; i < rank; ++i) narrow(static_cast<float>(from[i]) * step, to + i);
    for (int64_t i = 0; i < rotated; ++i) {
        Bfloat16 value;
        std::memcpy(&value, from + rank + 2 * i, sizeof value);
        narrow(widen(value), to + rank + i);
    }
}
