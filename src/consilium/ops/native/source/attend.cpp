// The first half of a decoder layer for one new token of each sequence: norm, projections, rotary positions,
// cache, attention, output projection, residual, and the norm in front of the second half.
//
// Legend: B tokens, D hidden, H heads, G heads of keys, K width of a head, N its part without position, R
// rotated pairs, V width of a value, Z rank of the latent, C values of a cached row.
#include <vector>

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

void attend_cached(const Pass &p, const Attend &a, int64_t b, const Heads &heads, int64_t count) {
    typed(static_cast<const void *>(a.storage), a.cache_type, [&](auto *data) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        attend_heads(heads, count, slots_of<T>(p, a, b), p.position[b] + 1);
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
    const int64_t each = a.heads / a.kv_heads;
    Rows x(p, p.hidden), q(p, a.heads * a.key), k(p, a.kv_heads * a.key), v(p, a.kv_heads * a.key);
    Rows mixed(p, a.heads * a.key), out(p, p.hidden);
    auto before = [&](Team::Member &member) {
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { enter(p, a, x, b); });
        multiply_all(member, {{&a.query, &q}, {&a.keys, &k}, {&a.values, &v}}, x);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { keep_grouped(p, a, q, k, v, b); });
    };
    auto between = [&](Team::Member &member) {
        member.loop(p.tokens * a.kv_heads, 1, [&](int64_t unit, int64_t) {
            const int64_t b = unit / a.kv_heads, g = unit % a.kv_heads;
            std::vector<const float *> queries(each);
            std::vector<float *> values(each);
            for (int64_t h = 0; h < each; ++h) {
                queries[h] = q[b] + (g * each + h) * a.key;
                values[h] = mixed[b] + (g * each + h) * a.key;
            }
            const Heads heads{queries.data(), values.data(), g * a.key, (a.kv_heads + g) * a.key,
                              a.key,          a.key,         static_cast<float>(a.softcap)};
            attend_cached(p, a, b, heads, each);
        });
    };
    run(p, a, false, before, between, q, mixed, out);
}

// The latent after its norm, then the shared key, go to the cache.
void keep_latent(const Pass &p, const Attend &a, Rows &down, Rows &rows, int64_t b) {
    normalise(a.query_norm, down[b], down.width(), down[b]);
    normalise(a.key_norm, rows[b], a.rank, rows[b]);
    rotate(rows[b] + a.rank, p.cos + b * a.pairs, p.sin + b * a.pairs, a.pairs, a.interleaved);
    write(rows[b], rows.width(), a.storage, a.cache_type, place(p, a, b));
}

// Rotation and scale of every head's query.
void turn_queries(const Pass &p, const Attend &a, Rows &q, int64_t b) {
    const int64_t wide = a.nope + 2 * a.pairs;
    for (int64_t h = 0; h < a.heads; ++h)
        rotate(q[b] + h * wide + a.nope, p.cos + b * a.pairs, p.sin + b * a.pairs, a.pairs, a.interleaved);
    for (int64_t i = 0; i < q.width(); ++i) q[b][i] *= static_cast<float>(a.scale);
}

// (q W_UK) c = q (W_UK c): heads [first, last) of a token's queries move into the latent space, and what they
// find moves out of it.
void absorbed(const Pass &p, const Attend &a, Rows &q, Rows &mixed, int64_t b, int64_t first, int64_t last) {
    const int64_t width = a.rank + 2 * a.pairs, wide = a.nope + 2 * a.pairs, count = last - first;
    std::vector<float> moved(count * width, 0.0f), found(count * a.rank);
    std::vector<const float *> queries(count), latents(count);
    std::vector<float *> values(count);
    typed(a.latent_up.data, a.latent_up.type, [&](auto *up) {
        for (int64_t h = 0; h < count; ++h) {
            float *query = q[b] + (first + h) * wide, *to = moved.data() + h * width;
            auto *own = up + (first + h) * (a.nope + a.value) * a.rank;
            const float *share = query;
            mix<1>(own, a.rank, a.rank, a.nope, &share, &to);
            std::copy_n(query + a.nope, 2 * a.pairs, to + a.rank);
            queries[h] = to, values[h] = found.data() + h * a.rank, latents[h] = values[h];
        }
        attend_cached(p, a, b, {queries.data(), values.data(), 0, 0, width, a.rank, 0.0f}, count);
        for (int64_t h = 0; h < count; ++h) {
            float *to = mixed[b] + (first + h) * a.value;
            auto *own = up + ((first + h) * (a.nope + a.value) + a.nope) * a.rank;
            using T = std::remove_const_t<std::remove_pointer_t<decltype(own)>>;
            products(Dense<T>{own, a.rank}, a.rank, a.value, &latents[h], 1, &to);
        }
    });
}

void latent(const Pass &p, const Attend &a) {
    const bool two = a.query_up.data;
    Rows x(p, p.hidden), down(p, two ? a.query.rows : 0), rows(p, a.keys.rows);
    Rows q(p, a.heads * (a.nope + 2 * a.pairs)), mixed(p, a.heads * a.value), out(p, p.hidden);
    const int64_t groups = (a.heads + HEADS - 1) / HEADS;
    auto before = [&](Team::Member &member) {
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { enter(p, a, x, b); });
        multiply_all(member, {{&a.query, two ? &down : &q}, {&a.keys, &rows}}, x);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { keep_latent(p, a, down, rows, b); });
        if (two) multiply_all(member, {{&a.query_up, &q}}, down);
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { turn_queries(p, a, q, b); });
    };
    auto between = [&](Team::Member &member) {
        member.loop(p.tokens * groups, 1, [&](int64_t unit, int64_t) {
            const int64_t first = unit % groups * HEADS;
            absorbed(p, a, q, mixed, unit / groups, first, std::min(first + HEADS, a.heads));
        });
    };
    run(p, a, true, before, between, q, mixed, out);
}

}  // namespace

void attend(const Pass &pass, const Attend &call, bool is_latent) {
    is_latent ? latent(pass, call) : grouped(pass, call);
}
