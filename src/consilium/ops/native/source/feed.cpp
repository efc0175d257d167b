// The second half of a decoder layer for one new token of each sequence: its experts, the shared ones or the
// dense network, and the residual.
//
// Legend: B tokens, K choices of a token, D hidden, F width of an expert.
#include <vector>

#include "layers.h"
#include "pool.h"
#include "products.h"

enum Activation : int64_t { SWIGLU = 0, GEGLU = 1, GELU = 2, RELU = 3, SQUARED_RELU = 4 };

namespace {

constexpr int64_t PIECE = 64;  // hidden values that a thread computes at once

float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }

float activate(int64_t activation, float gate, float up) {
    switch (activation) {
        case SWIGLU: return gate / (1.0f + exponential(-gate)) * up;
        case GEGLU: return gelu(gate) * up;
        case GELU: return gelu(gate);
        case RELU: return std::max(gate, 0.0f);
        default: return gate > 0 ? gate * gate : 0.0f;
    }
}

// A network and the tokens that visit it, each with the choice that led there.
struct Visit {
    Matrix up, down;
    int64_t first_up, first_down;  // row of each that its own begin with
    int64_t width;
    std::vector<int64_t> pair;     // where hidden values and outputs of each visit are
    std::vector<const float *> x;  // of each visit
    std::vector<float> factor;     // on what enters
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
        visit.x.push_back(p.normed + pair / f.choices * p.hidden);
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
        Visit visit{f.shared_up, f.shared_down, 0, 0, f.shared_width, {}, {}, {}};
        for (int64_t b = 0; b < p.tokens; ++b) {
            visit.pair.push_back(pairs + b);
            visit.x.push_back(p.normed + b * p.hidden);
            visit.factor.push_back(1.0f);
        }
        live.push_back(std::move(visit));
    }
    return live;
}

// Hidden values [begin, end) of every token that visits.
void widen_visit(const Feed &f, const Visit &visit, int64_t begin, int64_t end, float *hidden, int64_t stride) {
    const int64_t tokens = static_cast<int64_t>(visit.x.size()), count = end - begin;
    std::vector<float> gate(tokens * count), up(gated(f) ? tokens * count : 0);
    auto fill = [&](int64_t row, std::vector<float> &to) {
        rows_of(visit.up, visit.first_up + row, [&](auto rows) {
            products(rows, visit.up.columns, count, visit.x.data(), tokens,
                     [&](int64_t r, int64_t b, float value) { to[b * count + r] = value; });
        });
    };
    fill(begin, gate);
    if (gated(f)) fill(visit.width + begin, up);
    for (int64_t b = 0; b < tokens; ++b)
        for (int64_t i = 0; i < count; ++i) {
            const float first = gate[b * count + i] * visit.factor[b];
            const float second = gated(f) ? up[b * count + i] * visit.factor[b] : 0.0f;
            hidden[visit.pair[b] * stride + begin + i] = activate(f.activation, first, second);
        }
}

// Outputs [begin, end) of every token that visits.
void narrow_visit(const Pass &p, const Visit &visit, int64_t begin, int64_t end, const float *hidden,
                  int64_t stride, float *out) {
    std::vector<const float *> x;
    for (const int64_t pair : visit.pair) x.push_back(hidden + pair * stride);
    rows_of(visit.down, visit.first_down + begin, [&](auto rows) {
        products(rows, visit.down.columns, end - begin, x.data(), static_cast<int64_t>(x.size()),
                 [&](int64_t r, int64_t b, float value) { out[visit.pair[b] * p.hidden + begin + r] = value; });
    });
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
            multiply(f.shared_gate, 0, 1, &normed, 1, &share, 1);
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
    int64_t pieces = 0;
    for (const Visit &visit : visits) pieces += (rows(visit) + PIECE - 1) / PIECE;
    member.loop(pieces, 1, [&](int64_t piece, int64_t) {
        for (const Visit &visit : visits) {
            const int64_t own = (rows(visit) + PIECE - 1) / PIECE;
            if (piece < own) return body(visit, piece * PIECE, std::min((piece + 1) * PIECE, rows(visit)));
            piece -= own;
        }
    });
}

}  // namespace

void feed(const Pass &p, const Feed &f) {
    const std::vector<Visit> visits = visits_of(p, f);
    const int64_t stride = std::max(f.width, f.shared_width), pairs = p.tokens * (f.choices + 1);
    std::vector<float> hidden(pairs * stride), out(pairs * p.hidden);
    team().run(static_cast<int>(p.threads), [&](Team::Member &member) {
        each_piece(member, visits, [](const Visit &visit) { return visit.width; },
                   [&](const Visit &visit, int64_t begin, int64_t end) {
                       widen_visit(f, visit, begin, end, hidden.data(), stride);
                   });
        each_piece(member, visits, [&](const Visit &) { return p.hidden; },
                   [&](const Visit &visit, int64_t begin, int64_t end) {
                       narrow_visit(p, visit, begin, end, hidden.data(), stride, out.data());
                   });
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { gather(p, f, out.data(), b); });
    });
}
