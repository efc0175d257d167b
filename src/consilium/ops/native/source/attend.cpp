// The first half of a decoder layer for one new token of each sequence: norm, projections, rotary positions,
// cache, attention, output projection, residual, and the norm in front of the second half.
//
// Legend: B tokens, D hidden, H heads, G heads of keys, K width of a head, N its part without position, R
// rotated pairs, V width of a value, Z rank of the latent, C values of a cached row.
#include <type_traits>
#include <vector>

#include "latents.h"
#include "rows.h"

namespace {

// Pairs (2i, 2i + 1), or (i, i + R).
void rotate(float *x, const float *cos, const float *sin, int64_t pairs, bool interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
        float &a = x[interleaved ? 2 * i : i], &b = x[interleaved ? 2 * i + 1 : i + pairs];
        const float turned = a * cos[i] - b * sin[i];
        b = a * sin[i] + b * cos[i];
        a = turned;
    }
}

// Heads of every token and the cached rows that they read.
struct Reading {
    const float *queries;         // [B][H][K]
    int64_t heads, each;          // H, and how many read the same keys
    int64_t key_step;             // from the keys of some heads to those of the next
    int64_t value, value_step;    // where values begin, and the same of them
    int64_t key_width, value_width;
    float softcap;
    int64_t spans;                // of the longest sequence
    Buffer<float> found;          // [B][H][spans][V + 2]

    int64_t stride() const { return value_width + 2; }
    float *at(int64_t b, int64_t h) const { return found.data() + (b * heads + h) * spans * stride(); }
};

// Spans in which a token sees a slot, from that of its first one on.
int64_t spans_of(const Pass &p, const Attend &a, int64_t b) {
    return p.position[b] / SPAN - first_seen(p, a, b) / SPAN + 1;
}

Reading reading(const Pass &p, const Attend &a, const float *queries, int64_t each, int64_t key, int64_t value) {
    Reading r{queries, a.heads, each, 0, 0, 0, key, value, 0.0f, 0, {}};
    for (int64_t b = 0; b < p.tokens && !p.many; ++b) r.spans = std::max(r.spans, spans_of(p, a, b));
    r.found.want(p.tokens * a.heads * r.spans * r.stride());
    return r;
}

// The rows of a span as those of one page, as wide as tiles read them, or exact.
using Wide = std::conditional_t<PAIRED, Bfloat16, float>;
Slots<Wide> widened(const Slots<int8_t> &slots, const Attend &a, int64_t first, int64_t count) {
    thread_local Buffer<Wide> rows;
    const int64_t width = a.rank + 2 * a.pairs;
    rows.want(SPAN * width);
    for (int64_t i = 0; i < count; ++i) get_latent(slots.at(first + i), a.rank, 2 * a.pairs, rows.data() + i * width);
    return {rows.data(), nullptr, 0, width, SPAN};
}

// Every head in every span of its sequence, a few heads and one span at a time.
void find(Team::Member &member, const Pass &p, const Attend &a, const Reading &r) {
    const int64_t parts = (r.each + TOGETHER - 1) / TOGETHER, units = r.heads / r.each * parts;
    member.loop(p.tokens * r.spans * units, 1, [&](int64_t unit, int64_t) {
        const int64_t b = unit / (r.spans * units), span = unit / units % r.spans, group = unit % units / parts;
        const int64_t inside = unit % parts * TOGETHER, h = group * r.each + inside;
        const int64_t seen = first_seen(p, a, b), begin = (seen / SPAN + span) * SPAN, first = std::max(begin, seen);
        const int64_t count = std::min(begin + SPAN, p.position[b] + 1) - first;
        if (count <= 0) return;
        const Heads heads{r.queries + (b * r.heads + h) * r.key_width, std::min(TOGETHER, r.each - inside),
                          group * r.key_step, r.value + group * r.value_step, r.key_width, r.value_width, r.softcap};
        Buffer<float> found(heads.count * r.stride());
        if (a.cache_type == INT8) {
            attend_span(heads, widened(slots_of<int8_t>(p, a, b), a, first, count), 0, count, found.data());
        } else typed(static_cast<const void *>(a.storage), a.cache_type, [&](auto *data) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
            attend_span(heads, slots_of<T>(p, a, b), first, count, found.data());
        });
        for (int64_t i = 0; i < heads.count; ++i)
            std::copy_n(found.data() + i * r.stride(), r.stride(), r.at(b, h + i) + span * r.stride());
    });
}

// Behind attention: x += post(o), and the norm of x.
void finish(const Pass &p, const Attend &a, Rows &out, int64_t b) {
    float *x = p.x + b * p.hidden;
    normalise(a.post_norm, out[b], p.hidden, out[b]);
    for (int64_t i = 0; i < p.hidden; ++i) x[i] += out[b][i];
    normalise(a.next_norm, x, p.hidden, p.normed + b * p.hidden);
}

void enter(const Pass &p, const Attend &a, Rows &x, int64_t b) {
    normalise(a.norm, p.x + b * p.hidden, p.hidden, x[b]);
}

// Norm over each head or over all of them, then the rotation.
void turn(const Pass &p, const Attend &a, const Norm &norm, float *x, int64_t heads, int64_t b) {
    if (!a.norm_each) normalise(norm, x, heads * a.key, x);
    for (int64_t h = 0; h < heads; ++h) {
        if (a.norm_each) normalise(norm, x + h * a.key, a.key, x + h * a.key);
        rotate(x + h * a.key, p.cos + b * a.pairs, p.sin + b * a.pairs, a.pairs, a.interleaved);
    }
}

// Keys of a token, then its values, go to the cache.
void keep_grouped(const Pass &p, const Attend &a, Rows &q, Rows &k, Rows &v, int64_t b) {
    turn(p, a, a.query_norm, q[b], a.heads, b);
    turn(p, a, a.key_norm, k[b], a.kv_heads, b);
    for (int64_t i = 0; i < q.width(); ++i) q[b][i] *= static_cast<float>(a.scale);
    write(k[b], k.width(), a.storage, a.cache_type, place(p, a, b));
    write(v[b], v.width(), a.storage, a.cache_type, place(p, a, b) + k.width());
}

// What comes before attention, attention of few tokens or of a part of a prompt, and what comes behind it.
template <class Before, class Between>
void run(const Pass &p, const Attend &a, bool latent, Before &&before, Between &&between, Rows &q, Rows &mixed,
         Rows &out) {
    auto behind = [&](Team::Member &member) {
        multiply_all(member, {{&a.output, &out}}, mixed);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { finish(p, a, out, b); });
    };
    const int threads = static_cast<int>(p.threads);
    if (!p.many)
        return team().run(threads, [&](Team::Member &member) { before(member), between(member), behind(member); });
    team().run(threads, before);
    attend_prompt(p, a, latent, q, mixed);
    team().run(threads, behind);
}

void grouped(const Pass &p, const Attend &a) {
    Rows x(p, p.hidden), q(p, a.heads * a.key), k(p, a.kv_heads * a.key), v(p, a.kv_heads * a.key);
    Rows mixed(p, a.heads * a.key), out(p, p.hidden);
    auto before = [&](Team::Member &member) {
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { enter(p, a, x, b); });
        multiply_all(member, {{&a.query, &q}, {&a.keys, &k}, {&a.values, &v}}, x);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { keep_grouped(p, a, q, k, v, b); });
    };
    Reading r = reading(p, a, q[0], a.heads / a.kv_heads, a.key, a.key);
    r.softcap = static_cast<float>(a.softcap);
    r.key_step = r.value_step = a.key, r.value = a.kv_heads * a.key;
    auto between = [&](Team::Member &member) {
        find(member, p, a, r);
        member.loop(p.tokens * a.heads, 1, [&](int64_t unit, int64_t) {
            const int64_t b = unit / a.heads, h = unit % a.heads;
            merge_spans(r.at(b, h), r.stride(), spans_of(p, a, b), a.key, mixed[b] + h * a.key);
        });
    };
    run(p, a, false, before, between, q, mixed, out);
}

// The latent after its norm, then the shared key, go to the cache.
void keep_latent(const Pass &p, const Attend &a, Rows &down, Rows &rows, int64_t b) {
    normalise(a.query_norm, down[b], down.width(), down[b]);
    normalise(a.key_norm, rows[b], a.rank, rows[b]);
    rotate(rows[b] + a.rank, p.cos + b * a.pairs, p.sin + b * a.pairs, a.pairs, a.interleaved);
    if (a.cache_type == INT8)
        put_latent(rows[b], a.rank, 2 * a.pairs, static_cast<int8_t *>(a.storage) + place(p, a, b));
    else
        write(rows[b], rows.width(), a.storage, a.cache_type, place(p, a, b));
}

// Rotation and scale of every head's query.
void turn_queries(const Pass &p, const Attend &a, Rows &q, int64_t b) {
    const int64_t wide = a.nope + 2 * a.pairs;
    for (int64_t h = 0; h < a.heads; ++h)
        rotate(q[b] + h * wide + a.nope, p.cos + b * a.pairs, p.sin + b * a.pairs, a.pairs, a.interleaved);
    for (int64_t i = 0; i < q.width(); ++i) q[b][i] *= static_cast<float>(a.scale);
}

// (q W_UK) c = q (W_UK c): a head's query moves into the latent space.
void absorb(const Attend &a, const float *query, int64_t h, float *to) {
    std::fill_n(to, a.rank, 0.0f);
    typed(a.latent_up.data, a.latent_up.type, [&](auto *up) {
        mix<1>(up + h * (a.nope + a.value) * a.rank, a.rank, a.rank, a.nope, &query, &to);
    });
    std::copy_n(query + a.nope, 2 * a.pairs, to + a.rank);
}

// What a head found moves out of it.
void release(const Attend &a, const float *found, int64_t h, float *to) {
    typed(a.latent_up.data, a.latent_up.type, [&](auto *up) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(up)>>;
        const Dense<T> rows{up + (h * (a.nope + a.value) + a.nope) * a.rank, a.rank};
        products(rows, a.rank, a.value, &found, 1, &to);
    });
}

void latent(const Pass &p, const Attend &a) {
    const bool two = a.query_up.data;
    Rows x(p, p.hidden), down(p, two ? a.query.rows : 0), rows(p, a.keys.rows);
    Rows q(p, a.heads * (a.nope + 2 * a.pairs)), mixed(p, a.heads * a.value), out(p, p.hidden);
    const int64_t wide = a.nope + 2 * a.pairs, width = a.rank + 2 * a.pairs;
    const Buffer<float> moved(p.many ? 0 : p.tokens * a.heads * width);
    const Reading r = reading(p, a, moved.data(), a.heads, width, a.rank);
    auto before = [&](Team::Member &member) {
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { enter(p, a, x, b); });
        multiply_all(member, {{&a.query, two ? &down : &q}, {&a.keys, &rows}}, x);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { keep_latent(p, a, down, rows, b); });
        if (two) multiply_all(member, {{&a.query_up, &q}}, down);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { turn_queries(p, a, q, b); });
    };
    auto between = [&](Team::Member &member) {
        member.loop(p.tokens * a.heads, 1, [&](int64_t unit, int64_t) {
            const int64_t b = unit / a.heads, h = unit % a.heads;
            absorb(a, q[b] + h * wide, h, moved.data() + unit * width);
        });
        find(member, p, a, r);
        member.loop(p.tokens * a.heads, 1, [&](int64_t unit, int64_t) {
            const int64_t b = unit / a.heads, h = unit % a.heads;
            const Buffer<float> found(a.rank);
            merge_spans(r.at(b, h), r.stride(), spans_of(p, a, b), a.rank, found.data());
            release(a, found.data(), h, mixed[b] + h * a.value);
        });
    };
    run(p, a, true, before, between, q, mixed, out);
}

}  // namespace

void attend(const Pass &pass, const Attend &call, bool is_latent) {
    is_latent ? latent(pass, call) : grouped(pass, call);
}
