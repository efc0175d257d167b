// The second half of a decoder layer for one new token of each sequence: its experts, the shared ones or the
// dense network, and the residual.
//
// Legend: B tokens, K choices of a token, D hidden, F width of an expert.
#include <utility>
#include <vector>

#include "rows.h"

enum Activation : int64_t { SWIGLU = 0, GEGLU = 1, GELU = 2, RELU = 3, SQUARED_RELU = 4 };

namespace {

float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }

// What goes on of ``count`` pre-activations; ``up`` where the activation is gated.
void activate(int64_t activation, const float *gate, const float *up, int64_t count, float *to) {
    int64_t i = 0;
    for (; activation == SWIGLU && i + LANES <= count; i += LANES)
        store(to + i, load(gate + i) / (1.0f + exponential(-load(gate + i))) * load(up + i));
    for (; i < count; ++i) {
        const float x = gate[i];
        switch (activation) {
            case SWIGLU: to[i] = x / (1.0f + exponential(-x)) * up[i]; break;
            case GEGLU: to[i] = gelu(x) * up[i]; break;
            case GELU: to[i] = gelu(x); break;
            case RELU: to[i] = std::max(x, 0.0f); break;
            default: to[i] = x > 0 ? x * x : 0.0f;
        }
    }
}

// A network and the tokens that visit it, each with the choice that led there.
struct Visit {
    Matrix up, down;
    int64_t first_up, first_down;  // row of each that its own begin with
    int64_t width;
    std::vector<int64_t> pair;   // where hidden values and outputs of each visit are
    std::vector<int64_t> token;  // of each visit
    std::vector<float> factor;   // on what enters
    Active in, between;          // what is multiplied with up and with down
};

bool kept(const Feed &f, int64_t pair) { return !f.keep || f.keep[pair]; }

bool gated(const Feed &f) { return f.activation == SWIGLU || f.activation == GEGLU; }

// Live experts in rising order, then the shared or dense network, which all tokens visit.
std::vector<Visit> visits_of(const Pass &p, const Feed &f) {
    std::vector<Visit> all(f.experts);
    const int64_t pairs = p.tokens * f.choices, rows = f.width * (gated(f) ? 2 : 1);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        if (!kept(f, pair)) continue;
        Visit &visit = all[f.chosen[pair]];
        visit.pair.push_back(pair);
        visit.token.push_back(pair / f.choices);
        visit.factor.push_back(f.weight_on_input ? f.weights[pair] : 1.0f);
    }
    std::vector<Visit> live;
    for (int64_t e = 0; e < f.experts; ++e) {
        if (all[e].pair.empty()) continue;
        all[e].up = f.up, all[e].down = f.down, all[e].width = f.width;
        all[e].first_up = e * rows, all[e].first_down = e * p.hidden;
        live.push_back(std::move(all[e]));
    }
    if (f.shared_up.data) {
        Visit visit{f.shared_up, f.shared_down, 0, 0, f.shared_width, {}, {}, {}, {}, {}};
        for (int64_t b = 0; b < p.tokens; ++b) {
            visit.pair.push_back(pairs + b);
            visit.token.push_back(b);
            visit.factor.push_back(1.0f);
        }
        live.push_back(std::move(visit));
    }
    return live;
}

Way way_in(const Visit &visit) { return way_of(visit.up.type, visit.in); }
Way way_between(const Visit &visit) { return way_of(visit.down.type, visit.between); }

bool is_rounded(Way way) { return way == INTEGERS8 || way == INTEGERS4; }

// What enters each network. Rounded integers are those of the token, whoever reads them.
void enter(Team::Member &member, std::vector<Visit> &visits, Active &tokens) {
    bool packed[WAYS] = {};
    for (const Visit &visit : visits) {
        const Way way = way_of(visit.up.type, tokens);
        if (is_rounded(way) && !std::exchange(packed[way], true)) pack(member, way, tokens);
    }
    member.loop(static_cast<int64_t>(visits.size()), 1, [&](int64_t v, int64_t) {
        visits[v].in = Active::some(tokens, visits[v].token);
        if (!visits[v].in.holds(way_in(visits[v]))) pack_alone(way_in(visits[v]), visits[v].in);
    });
}

// Hidden values [begin, end) of every token that visits.
void widen_visit(const Feed &f, const Visit &visit, int64_t begin, int64_t end, float *hidden, int64_t stride) {
    const int64_t tokens = visit.in.tokens(), count = end - begin;
    thread_local Buffer<float> gate, up;
    gate.want(tokens * count), up.want(tokens * count);
    auto fill = [&](int64_t row, const Buffer<float> &values) {
        std::vector<float *> to(tokens);
        for (int64_t b = 0; b < tokens; ++b) to[b] = values.data() + b * count;
        multiply(visit.up, visit.first_up + row, visit.first_up + row + count, way_in(visit), visit.in, to.data());
        for (int64_t b = 0; b < tokens && f.weight_on_input; ++b)
            for (int64_t i = 0; i < count; ++i) to[b][i] *= visit.factor[b];
    };
    fill(begin, gate);
    if (gated(f)) fill(visit.width + begin, up);
    for (int64_t b = 0; b < tokens; ++b)
        activate(f.activation, gate.data() + b * count, gated(f) ? up.data() + b * count : nullptr, count,
                 hidden + visit.pair[b] * stride + begin);
}

// Outputs [begin, end) of every token that visits.
void narrow_visit(const Pass &p, const Visit &visit, int64_t begin, int64_t end, float *out) {
    std::vector<float *> to;
    for (const int64_t pair : visit.pair) to.push_back(out + pair * p.hidden + begin);
    multiply(visit.down, visit.first_down + begin, visit.first_down + end, way_between(visit), visit.between,
             to.data());
}

// x += post(the sum of a token's choices in their order, the shared output at last).
void gather(const Pass &p, const Feed &f, const float *out, int64_t b) {
    std::vector<float> y(p.hidden, 0.0f);
    for (int64_t pair = b * f.choices; pair < (b + 1) * f.choices; ++pair) {
        if (!kept(f, pair)) continue;
        const float weight = f.weight_on_input ? 1.0f : f.weights[pair];
        for (int64_t i = 0; i < p.hidden; ++i) y[i] += weight * out[pair * p.hidden + i];
    }
    if (f.shared_up.data) {
        const float *normed = p.normed + b * p.hidden, *shared = out + (p.tokens * f.choices + b) * p.hidden;
        float share = 1.0f;
        if (f.shared_gate.data) {
            float *to = &share;
            multiply(f.shared_gate, 0, 1, FLOATS, Active(normed, 1, p.hidden, false), &to);
            share = 1.0f / (1.0f + exponential(-share));
        }
        for (int64_t i = 0; i < p.hidden; ++i) y[i] += share * shared[i];
    }
    normalise(f.post_norm, y.data(), p.hidden, y.data());
    for (int64_t i = 0; i < p.hidden; ++i) p.x[b * p.hidden + i] += y[i];
}

// Calls body(visit, begin, end) for pieces of ``rows(visit)`` rows of every visit, shared among the threads.
template <class Count, class Body>
void each_piece(Team::Member &member, const std::vector<Visit> &visits, Count &&rows, Body &&body) {
    int64_t pieces = 0, all = 0;
    for (const Visit &visit : visits) all += rows(visit);
    const int64_t each = piece_of(all, member.threads(), !visits.empty() && visits[0].in.many);
    for (const Visit &visit : visits) pieces += (rows(visit) + each - 1) / each;
    member.loop(pieces, 1, [&](int64_t piece, int64_t) {
        for (const Visit &visit : visits) {
            const int64_t own = (rows(visit) + each - 1) / each;
            if (piece < own) return body(visit, piece * each, std::min((piece + 1) * each, rows(visit)));
            piece -= own;
        }
    });
}

}  // namespace

void networks(const Pass &p, const Feed &f, float *out) {
    std::vector<Visit> visits = visits_of(p, f);
    const int64_t stride = std::max(f.width, f.shared_width), pairs = p.tokens * (f.choices + 1);
    const Buffer<float> hidden(pairs * stride);
    Active tokens(p.normed, p.tokens, p.hidden, p.many);
    team().run(static_cast<int>(p.threads), [&](Team::Member &member) {
        enter(member, visits, tokens);
        each_piece(member, visits, [](const Visit &visit) { return visit.width; },
                   [&](const Visit &visit, int64_t begin, int64_t end) {
                       widen_visit(f, visit, begin, end, hidden.data(), stride);
                   });
        member.loop(static_cast<int64_t>(visits.size()), 1, [&](int64_t v, int64_t) {
            Active &between = visits[v].between;
            between.many = p.many, between.width = visits[v].width;
            for (const int64_t pair : visits[v].pair) between.at.push_back(hidden.data() + pair * stride);
            pack_alone(way_between(visits[v]), between);
        });
        each_piece(member, visits, [&](const Visit &) { return p.hidden; },
                   [&](const Visit &visit, int64_t begin, int64_t end) {
                       narrow_visit(p, visit, begin, end, out);
                   });
    });
}

void feed(const Pass &p, const Feed &f) {
    const Buffer<float> out(p.tokens * (f.choices + 1) * p.hidden);
    networks(p, f, out.data());
    team().run(static_cast<int>(p.threads), [&](Team::Member &member) {
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { gather(p, f, out.data(), b); });
    });
}
