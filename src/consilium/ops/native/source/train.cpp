// The products of training, of the pass forward and of both gradients, over rows that are sorted by expert.
//
// Each is C(m, n) = sum over k of A(m, k) B(n, k). Both sides are packed into words of four bytes, a float or two
// bfloat16 whose products are summed in float32, so that a word of A is spread over lanes of B. What lies in memory
// wider than that is narrowed on the way and never written so.
//
// Legend: M rows and N columns of C, K values that are summed, S steps of a word, R rows at once.
#include <vector>

#include "narrow.h"
#include "pool.h"
#include "train.h"
#include "values.h"

namespace {

constexpr int64_t STEPS = 512;                                 // at once: their words of B stay in the second cache
constexpr int64_t WIDE = 3;                                    // vectors of B at once
constexpr int64_t COLUMNS = WIDE * LANES;                      // of C that a thread takes
constexpr int64_t HELD_ROWS = LANES == 4 ? 4 : LANES / 2;      // R
constexpr int64_t WORTH = 4 << 20;   // multiplications from which other threads are worth waking
constexpr int64_t CACHED = 8 << 20;  // values of a gradient beyond which it would only empty the caches

// One side of a product: item i is a row or a column of ``data``.
struct Side {
    const void *data;
    int64_t type, stride, items;
    bool along;  // whether the values of an item lie side by side, or the items at one k do

    Side from(int64_t place) const {
        return {static_cast<const char *>(data) + place * size_of(type), type, stride, items, along};
    }
};

// What a word holds, how words are made of memory, and what is done with them.
template <class V> struct Word;

template <> struct Word<float> {
    static constexpr int64_t EACH = 1;
    // LANES values of an item, of which ``have`` are there.
    template <class T> static Words along(const T *from, int64_t have) {
        return reinterpret_cast<Words>(have >= LANES ? load(from) : load_part(from, have));
    }
    // One step of LANES items, of which ``have`` are there.
    template <class T> static Words across(const T *from, int64_t, int64_t have, int64_t) { return along(from, have); }
    static Vector multiply(Vector total, Words a, Words b) {
        return total + reinterpret_cast<Vector>(a) * reinterpret_cast<Vector>(b);
    }
};

#if defined(__AVX512BF16__)
template <> struct Word<Bfloat16> {
    static constexpr int64_t EACH = 2;
    template <class T> static Words along(const T *from, int64_t have) {
        return reinterpret_cast<Words>(narrowed(from, have));
    }
    template <class T> static Words across(const T *from, int64_t stride, int64_t have, int64_t left) {
        const auto there = static_cast<__mmask16>(have >= 16 ? 0xffff : (1u << have) - 1);
        const __m256i odd = left > 1 ? sixteen(from + stride, there) : __m256i{};
        return reinterpret_cast<Words>(side_by_side(sixteen(from, there), odd));
    }
    static Vector multiply(Vector total, Words a, Words b) {
        return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                         reinterpret_cast<__m512bh>(a),
                                                         reinterpret_cast<__m512bh>(b)));
    }
};
#endif

template <class V> static inline int64_t steps_of(int64_t k) { return (k + Word<V>::EACH - 1) / Word<V>::EACH; }
static inline int64_t blocks_of(int64_t items) { return (items + LANES - 1) / LANES; }

// LANES items of a side from ``first`` on, values [begin, end): [S][LANES], zeros for items that are not there.
template <class V, class T>
static inline void pack_along(const T *from, const Side &side, int64_t first, int64_t begin, int64_t end, Words *to) {
    const int64_t have = std::min<int64_t>(LANES, side.items - first), steps = steps_of<V>(end - begin);
    for (int64_t s = 0; s < steps; s += LANES) {
        Vector rows[LANES] = {};
        const int64_t k = begin + s * Word<V>::EACH;
        for (int64_t i = 0; i < have; ++i)
            rows[i] = reinterpret_cast<Vector>(Word<V>::along(from + (first + i) * side.stride + k, end - k));
        transpose(rows);
        std::memcpy(static_cast<void *>(to + s), rows, std::min<int64_t>(LANES, steps - s) * sizeof *to);
    }
}

// The same of so many items, [items / LANES][S][LANES], blocks ``apart``.
template <class V, class T>
static inline void pack_across(const T *from, const Side &side, int64_t first, int64_t last, int64_t begin, int64_t end,
                               Words *to, int64_t apart) {
    const int64_t steps = steps_of<V>(end - begin);
    for (int64_t s = 0; s < steps; ++s) {
        const int64_t k = begin + s * Word<V>::EACH;
        const T *row = from + k * side.stride;
        for (int64_t i = first; i < last; i += LANES) {
            const int64_t have = std::min<int64_t>(LANES, last - i);
            to[(i - first) / LANES * apart + s] = Word<V>::across(row + i, side.stride, have, end - k);
        }
    }
}

template <class V>
static inline void pack_side(const Side &side, int64_t first, int64_t last, int64_t begin, int64_t end, Words *to,
                             int64_t apart) {
    typed(side.data, side.type, [&](auto *from) {
        if (!side.along) return pack_across<V>(from, side, first, last, begin, end, to, apart);
        for (int64_t i = first; i < last; i += LANES)
            pack_along<V>(from, side, i, begin, end, to + (i - first) / LANES * apart);
    });
}

#if defined(__AVX512F__)
static inline void stream(float *to, Vector value) { _mm512_stream_ps(to, reinterpret_cast<__m512>(value)); }
#elif defined(__AVX2__)
static inline void stream(float *to, Vector value) { _mm256_stream_ps(to, reinterpret_cast<__m256>(value)); }
#endif
// What was streamed is there before others are told of it.
static inline void finish() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}
static inline void narrow_store(Vector value, int64_t have, float *to, bool past) {
#if defined(__AVX2__)
    if (past && have >= LANES && reinterpret_cast<uintptr_t>(to) % sizeof value == 0) return stream(to, value);
#endif
    have >= LANES ? store(to, value) : static_cast<void>(std::memcpy(to, &value, have * sizeof *to));
}
static inline void narrow_store(Vector value, int64_t have, Bfloat16 *to, bool) {
#if defined(__AVX512BF16__)
    const auto there = static_cast<__mmask16>(have >= 16 ? 0xffff : (1u << have) - 1);
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    _mm256_mask_storeu_epi16(to, there, reinterpret_cast<__m256i>(halves));
#else
    narrow_row(reinterpret_cast<const float *>(&value), std::min<int64_t>(have, LANES), to);
#endif
}

// R items of A with W vectors of B, whose steps are STEPS apart, beside what earlier steps left in ``sums``
// [R][COLUMNS]; null where there are none. Calls give(r, w, sum).
template <class V, int W, class Give>
static inline void add_block(const uint32_t *a, const Words *b, int64_t steps, const float *sums, Give &&give) {
    Vector total[HELD_ROWS][W];
    for (int r = 0; r < HELD_ROWS; ++r)
        for (int w = 0; w < W; ++w) total[r][w] = sums ? load(sums + r * COLUMNS + w * LANES) : Vector{};
    for (int64_t s = 0; s < steps; ++s) {
        Words lanes[W];
        for (int w = 0; w < W; ++w) lanes[w] = b[w * STEPS + s];
        for (int r = 0; r < HELD_ROWS; ++r) {
            const Words one = Words{} + a[s * LANES + r];
            for (int w = 0; w < W; ++w) total[r][w] = Word<V>::multiply(total[r][w], one, lanes[w]);
        }
    }
    for (int r = 0; r < HELD_ROWS; ++r)
        for (int w = 0; w < W; ++w) give(r, w, total[r][w]);
}

// Memory that is read next, fetched into the second cache line by line while others are computed.
struct Ahead {
    const char *row = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0, at = 0;

    void fetch(int64_t lines) {
        for (; rows && lines; --lines) {
            __builtin_prefetch(row + at, 0, 2);
            if ((at += 64) >= bytes) row += stride, --rows, at = 0;
        }
    }
    int64_t lines() const { return rows * ((bytes + 63) / 64); }
};

// Items [first, last) of a side, their first ``k`` values.
static inline Ahead ahead_of(const Side &side, int64_t first, int64_t last, int64_t k) {
    const int64_t size = size_of(side.type);
    const auto *data = static_cast<const char *>(side.data) + first * size * (side.along ? side.stride : 1);
    if (side.along) return {data, last - first, k * size, side.stride * size};
    return {data, k, (last - first) * size, side.stride * size};
}

// The products of one expert.
struct Task {
    Side a, b;
    int64_t k;
    void *out;  // [M][N]
    int64_t type;
    bool past;  // whether C is written past the caches
};

// W vectors of columns of C from ``first`` on, of steps [begin, end): of all but the last the sums are kept.
template <class V, int W>
static inline void vectors_of(const Task &task, const Words *a, const Words *b, int64_t first, int64_t begin,
                              int64_t end, float *sums, Ahead &ahead) {
    const int64_t steps = steps_of<V>(task.k), m_end = task.a.items, n = task.b.items;
    const int64_t lines = ahead.lines() * HELD_ROWS / std::max<int64_t>(m_end, 1) + 1;
    for (int64_t m = 0; m < m_end; m += HELD_ROWS) {
        ahead.fetch(lines);
        const auto *rows = reinterpret_cast<const uint32_t *>(a + m / LANES * steps + begin) + m % LANES;
        float *own = sums + m * COLUMNS;
        const float *before = begin ? own : nullptr;
        if (end < steps) {
            add_block<V, W>(rows, b, end - begin, before,
                            [&](int r, int w, Vector sum) { store(own + r * COLUMNS + w * LANES, sum); });
            continue;
        }
        typed(task.out, task.type, [&](auto *out) {
            add_block<V, W>(rows, b, end - begin, before, [&](int r, int w, Vector sum) {
                const int64_t column = first + w * LANES;
                if (m + r < m_end) narrow_store(sum, n - column, out + (m + r) * n + column, task.past);
            });
        });
    }
}

// COLUMNS columns of C from ``first`` on, of A as it is packed: [M / LANES][S][LANES].
template <class V> static inline void columns_of(const Task &task, const Words *a, int64_t first, float *sums, Ahead ahead) {
    alignas(64) static thread_local Words b[WIDE * STEPS];
    const int64_t steps = steps_of<V>(task.k), last = std::min(first + COLUMNS, task.b.items);
    const int64_t wide = blocks_of(last - first);
    const auto of = wide == 1 ? vectors_of<V, 1> : wide == 2 ? vectors_of<V, 2> : vectors_of<V, 3>;
    for (int64_t begin = 0; begin < std::max<int64_t>(steps, 1); begin += STEPS) {
        const int64_t end = std::min(begin + STEPS, steps), k_end = std::min(end * Word<V>::EACH, task.k);
        pack_side<V>(task.b, first, last, begin * Word<V>::EACH, k_end, b, STEPS);
        of(task, a, b, first, begin, end, sums, ahead);
    }
}

// Which of the ranges that begin at ``begins`` has the i-th of all.
static inline int64_t range_of(const std::vector<int64_t> &begins, int64_t i) {
    return std::upper_bound(begins.begin(), begins.end(), i) - begins.begin() - 1;
}

// All products, A packed first; columns of C are shared in pieces of neighbours.
template <class V> class Products {
  public:
    // Throws std::bad_alloc; nothing is allocated later.
    Products(const std::vector<Task> &tasks, int64_t asked) : tasks(tasks) {
        int64_t all = 0;
        for (const Task &task : tasks) {
            const int64_t rows = blocks_of(task.a.items), steps = steps_of<V>(task.k);
            blocks.push_back(blocks.back() + rows);
            places.push_back(places.back() + rows * steps);
            columns.push_back(columns.back() + (rows ? (task.b.items + COLUMNS - 1) / COLUMNS : 0));
            all += task.a.items * task.b.items * task.k;
            if (steps > STEPS) kept = std::max(kept, rows * LANES * COLUMNS);
        }
        threads = all < WORTH ? 1 : asked;
        packed.want(places.back());
        sums.want(kept * threads);
    }

    void run() {
        const int64_t piece = std::max<int64_t>(1, columns.back() / (32 * threads));
        const auto region = [&](Team::Member &member) {
            member.loop(blocks.back(), 1, [&](int64_t i, int64_t) { pack_block(i); });
            member.loop(columns.back(), piece, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i)
                    multiply_columns(i, i + 1 < end, sums.data() + kept * member.number);
                finish();
            });
        };
        threads == 1 ? team().run(1, region) : team().run_between_operators(static_cast<int>(threads), region);
    }

  private:
    void pack_block(int64_t i) {
        const int64_t e = range_of(blocks, i), own = i - blocks[e], first = own * LANES;
        const Task &task = tasks[e];
        Words *to = packed.data() + places[e] + own * steps_of<V>(task.k);
        pack_side<V>(task.a, first, std::min<int64_t>(first + LANES, task.a.items), 0, task.k, to, 0);
    }

    void multiply_columns(int64_t i, bool more, float *own) {
        const int64_t e = range_of(columns, i), f = range_of(columns, i + 1);
        Ahead ahead;
        if (more) {
            const int64_t first = (i + 1 - columns[f]) * COLUMNS, last = std::min(first + COLUMNS, tasks[f].b.items);
            ahead = ahead_of(tasks[f].b, first, last, std::min(tasks[f].k, STEPS * Word<V>::EACH));
        }
        columns_of<V>(tasks[e], packed.data() + places[e], (i - columns[e]) * COLUMNS, own, ahead);
    }

    const std::vector<Task> &tasks;
    std::vector<int64_t> blocks{0}, places{0}, columns{0};  // where those of each expert begin
    Buffer<Words> packed;
    int64_t threads = 1, kept = 0;  // kept: sums of a thread, where K has several parts
    Buffer<float> sums;
};

// What the sides of an expert are, whose rows are [begin, end).
Task task_of(const Sorted &call, int64_t e, int64_t begin, int64_t end) {
    const int64_t rows = end - begin, outputs = call.outputs, inputs = call.inputs, matrix = e * outputs * inputs;
    const int64_t type = call.out_type, width = call.kind == TIMES_TRANSPOSED ? inputs : outputs;
    const Side left{call.rows, call.rows_type, width, rows, true};
    const Side right{call.other, call.other_type, inputs, inputs, false};
    const auto at = [&](int64_t place) { return static_cast<char *>(call.out) + place * size_of(call.out_type); };
    switch (call.kind) {
        case TIMES_TRANSPOSED: {
            const Side by_row{call.other, call.other_type, inputs, outputs, true};
            return {left.from(begin * inputs), by_row.from(matrix), inputs, at(begin * outputs), type, false};
        }
        case TIMES:
            return {left.from(begin * outputs), right.from(matrix), outputs, at(begin * inputs), type, false};
        default: {
            const Side by_column{call.rows, call.rows_type, outputs, outputs, false};
            const bool past = call.experts * outputs * inputs > CACHED;
            return {by_column.from(begin * outputs), right.from(begin * inputs), rows, at(matrix), type, past};
        }
    }
}

}  // namespace

void sorted(const Sorted &call, int64_t threads) {
    std::vector<Task> tasks;
    for (int64_t e = 0, begin = 0; e < call.experts; begin = call.ends[e++])
        tasks.push_back(task_of(call, e, begin, call.ends[e]));
#if defined(__AVX512BF16__)
    if (call.rows_type == BFLOAT16) return Products<Bfloat16>(tasks, threads).run();
#endif
    Products<float>(tasks, threads).run();
}
