// What the products of training are called with (library.py).
#pragma once

#include <cstdint>

enum Kind : int64_t { TIMES_TRANSPOSED = 0, TIMES = 1, OUTER = 2 };

// Rows [R] are sorted by expert: those of e end at ends[e]. TIMES_TRANSPOSED: rows [R][I], other [E][O][I] and out
// [R][O]. TIMES: rows [R][O], other [E][O][I] and out [R][I]. OUTER: rows [R][O], other [R][I] and out [E][O][I].
struct Sorted {
    int64_t kind, experts, outputs, inputs;
    int64_t rows_type, other_type, out_type;  // rows of bfloat16 are multiplied as such where the processor can
    const int64_t *ends;
    const void *rows, *other;
    void *out;
};

void sorted(const Sorted &call, int64_t threads);
