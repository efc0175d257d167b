// Attention of a part of a prompt: tokens of one sequence at rising positions, over the cached rows that each sees.
//
// Slots are taken in spans at fixed places, from that of the first slot that a token of the part sees. Of a span the
// keys and the values of all heads are laid out as matrices, latents expanded; then every head of every block of tokens
// adds what it finds there, in the order of spans.
//
// Legend: T tokens of a block, H heads, G heads of keys, L slots of a span, K width of a key, V width of a value, Z
// rank of the latent.
#include <memory>
#include <type_traits>
#include <vector>

#include "latents.h"
#include "rows.h"

namespace {

constexpr int64_t SLOTS = 512;  // L at most
constexpr int64_t BLOCK = Active::PART;

// Keys [G][L][K] and values [G][V][L] of a span. Cells are as wide as the cache where tiles multiply them.
template <class Cell> struct Spread {
    int64_t heads, key, value;
    std::vector<Cell> keys, values;

    Spread(int64_t heads, int64_t key, int64_t value)
        : heads(heads), key(key), value(value), keys(heads * SLOTS * key), values(heads * value * SLOTS) {}

    void put_key(int64_t g, int64_t slot, const float *own, int64_t width, const float *shared) {
        Cell *to = keys.data() + (g * SLOTS + slot) * key;
        narrow_row(own, width, to);
        narrow_row(shared, key - width, to + width);
    }

    // Of slots from ``slot`` on, ``stride`` apart.
    void put_values(int64_t g, int64_t slot, int64_t count, const float *from, int64_t stride) {
        for (int64_t i = 0; i < value; ++i) {
            float row[SLOTS];
            for (int64_t s = 0; s < count; ++s) row[s] = from[s * stride + i];
            narrow_row(row, count, values.data() + (g * value + i) * SLOTS + slot);
        }
    }

    static constexpr int64_t TYPE = std::is_same_v<Cell, Bfloat16> ? BFLOAT16 : FLOAT32;
    Matrix keys_of(int64_t g, int64_t count) const {
        return {keys.data() + g * SLOTS * key, nullptr, nullptr, count, key, TYPE, 0};
    }
    Matrix values_of(int64_t g) const {
        return {values.data() + g * value * SLOTS, nullptr, nullptr, value, SLOTS, TYPE, 0};
    }
};

// One head of a block of tokens, and how far its softmax is.
struct Unit {
    int64_t head, begin, count;
    Active queries;
    std::vector<float> largest, total;
    bool visited = false;
};

template <class T> void read_row(const Pass &p, const Attend &a, int64_t slot, int64_t width, float *to) {
    const T *row = slots_of<T>(p, a, 0).at(slot);
    if constexpr (std::is_same_v<T, int8_t>)
        get_latent(row, a.rank, 2 * a.pairs, to);
    else
        for (int64_t i = 0; i < width; ++i) to[i] = widen(row[i]);
}

// Slots of the span that nobody sees are left as they are, finite.
template <class T, class Cell>
void spread_grouped(Team::Member &member, const Pass &p, const Attend &a, int64_t first, int64_t count,
                    Spread<Cell> &span) {
    const int64_t unseen = std::max<int64_t>(0, first_seen(p, a, 0) - first);
    member.loop(count - unseen, 16, [&](int64_t from, int64_t to) {
        const int64_t width = 2 * a.kv_heads * a.key, begin = unseen + from, end = unseen + to;
        const Buffer<float> rows((end - begin) * width);
        for (int64_t slot = begin; slot < end; ++slot) {
            float *row = rows.data() + (slot - begin) * width;
            read_row<T>(p, a, first + slot, width, row);
            for (int64_t g = 0; g < a.kv_heads; ++g) span.put_key(g, slot, row + g * a.key, a.key, row);
        }
        for (int64_t g = 0; g < a.kv_heads; ++g)
            span.put_values(g, begin, end - begin, rows.data() + (a.kv_heads + g) * a.key, width);
    });
}

template <class T, class Cell>
void spread_latent(Team::Member &member, const Pass &p, const Attend &a, int64_t first, std::vector<float> &rows,
                   Active &latents, Spread<Cell> &span) {
    const int64_t width = a.rank + 2 * a.pairs, each = a.nope + a.value, count = latents.tokens();
    member.loop(count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t slot = begin; slot < end; ++slot)
            read_row<T>(p, a, first + slot, width, rows.data() + slot * width);
    });
    const Way way = way_of(a.latent_up.type, latents);
    pack(member, way, latents);
    member.loop(a.heads, 1, [&](int64_t h, int64_t) {
        thread_local Buffer<float> found;
        found.want(count * each);
        std::vector<float *> to(count);
        for (int64_t slot = 0; slot < count; ++slot) to[slot] = found.data() + slot * each;
        multiply(a.latent_up, h * each, (h + 1) * each, way, latents, to.data());
        for (int64_t slot = 0; slot < count; ++slot)
            span.put_key(h, slot, to[slot], a.nope, rows.data() + slot * width + a.rank);
        span.put_values(h, 0, count, found.data() + a.nope, each);
    });
}

// Logits of the slots [begin, end) that a token sees become shares of the largest so far, the others zeros; returns
// what sums so far are to be multiplied by.
float share(const Attend &a, float *logits, int64_t begin, int64_t end, int64_t count, float &largest, float &total) {
    begin = std::clamp<int64_t>(begin, 0, count), end = std::clamp<int64_t>(end, begin, count);
    std::fill(logits, logits + begin, 0.0f);
    std::fill(logits + end, logits + count, 0.0f);
    if (begin == end) return 1.0f;
    const int64_t visible = end - begin;
    logits += begin;
    const auto cap = static_cast<float>(a.softcap);
    for (int64_t i = 0; i < visible && cap > 0; ++i) logits[i] = cap * std::tanh(logits[i] / cap);
    const float before = largest;
    largest = std::max(before, largest_of(logits, visible));
    const float shrunk = total > 0 ? exponential(before - largest) : 0.0f;
    total = total * shrunk + shares_of(logits, visible, largest);
    return shrunk;
}

// Add what a unit finds in a span to its values, ``width`` apart in ``mixed``.
template <class Cell>
void visit(const Pass &p, const Attend &a, const Spread<Cell> &span, int64_t first, int64_t count, Unit &unit,
           Rows &mixed) {
    const int64_t last = unit.begin + unit.count - 1;
    if (p.position[last] < first || first_seen(p, a, unit.begin) >= first + count) return;
    count = std::min(count, p.position[last] + 1 - first);
    const int64_t g = unit.head / (a.heads / span.heads);
    thread_local Buffer<float> logits, found;
    logits.want(unit.count * count), found.want(unit.count * span.value);
    std::vector<float *> to(unit.count);
    for (int64_t b = 0; b < unit.count; ++b) to[b] = logits.data() + b * count;
    const Matrix keys = span.keys_of(g, count), values = span.values_of(g);
    multiply(keys, 0, count, way_of(keys.type, unit.queries), unit.queries, to.data());
    std::vector<float> shrunk(unit.count);
    for (int64_t b = 0; b < unit.count; ++b) {
        const int64_t begin = first_seen(p, a, unit.begin + b) - first, end = p.position[unit.begin + b] + 1 - first;
        shrunk[b] = share(a, to[b], begin, end, count, unit.largest[b], unit.total[b]);
    }
    Active shares(logits.data(), unit.count, count, true);
    const Way way = way_of(values.type, shares);
    pack_alone(way, shares);
    for (int64_t b = 0; b < unit.count; ++b) to[b] = found.data() + b * span.value;
    multiply(values, 0, span.value, way, shares, to.data());
    for (int64_t b = 0; b < unit.count; ++b) {
        float *sums = mixed[unit.begin + b] + unit.head * span.value;
        for (int64_t i = 0; i < span.value; ++i) sums[i] = (unit.visited ? sums[i] * shrunk[b] : 0.0f) + to[b][i];
    }
    unit.visited = true;
}

std::vector<Unit> units_of(const Pass &p, const Attend &a, int64_t key, Rows &q) {
    std::vector<Unit> units;
    for (int64_t begin = 0; begin < p.tokens; begin += BLOCK)
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t count = std::min(BLOCK, p.tokens - begin);
            Unit unit{h, begin, count, {}, std::vector<float>(count, -INFINITY), std::vector<float>(count, 0.0f), false};
            unit.queries.many = true, unit.queries.width = key;
            for (int64_t b = 0; b < count; ++b) unit.queries.at.push_back(q[begin + b] + h * key);
            units.push_back(std::move(unit));
        }
    return units;
}

template <class T, class Cell> void attend_spans(const Pass &p, const Attend &a, bool latent, Rows &q, Rows &mixed) {
    const int64_t key = latent ? a.nope + 2 * a.pairs : a.key, width = a.rank + 2 * a.pairs;
    Spread<Cell> span(latent ? a.heads : a.kv_heads, key, latent ? a.value : a.key);
    std::vector<Unit> units = units_of(p, a, key, q);
    const auto pieces = static_cast<int64_t>(units.size());
    std::vector<float> rows(latent ? SLOTS * width : 0);
    const int64_t length = p.position[p.tokens - 1] + 1, begin = first_seen(p, a, 0) / SLOTS * SLOTS;
    for (int64_t first = begin; first < length; first += SLOTS) {
        const int64_t count = std::min(SLOTS, length - first);
        Active latents(nullptr, 0, a.rank, true);
        for (int64_t slot = 0; latent && slot < count; ++slot) latents.at.push_back(rows.data() + slot * width);
        team().run(static_cast<int>(p.threads), [&](Team::Member &member) {
            if (latent)
                spread_latent<T>(member, p, a, first, rows, latents, span);
            else
                spread_grouped<T>(member, p, a, first, count, span);
            member.loop(pieces, 1, [&](int64_t i, int64_t) {
                Unit &unit = units[pieces - 1 - i];  // those that see most come first
                if (first == begin) pack_alone(way_of(Spread<Cell>::TYPE, unit.queries), unit.queries);
                visit(p, a, span, first, count, unit, mixed);
            });
        });
    }
    for (const Unit &unit : units)
        for (int64_t b = 0; b < unit.count; ++b)
            for (int64_t i = 0; i < span.value; ++i)
                mixed[unit.begin + b][unit.head * span.value + i] /= unit.total[b];
}

}  // namespace

void attend_prompt(const Pass &p, const Attend &a, bool latent, Rows &q, Rows &mixed) {
    using Narrow = std::conditional_t<PAIRED, Bfloat16, float>;
    if (a.cache_type == FLOAT32) return attend_spans<float, float>(p, a, latent, q, mixed);
    if (a.cache_type == INT8) return attend_spans<int8_t, Narrow>(p, a, latent, q, mixed);
    attend_spans<Bfloat16, Narrow>(p, a, latent, q, mixed);
}
