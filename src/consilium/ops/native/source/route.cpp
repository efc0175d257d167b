// The fused router: gate, score, groups, choice and weights of every token; the twin of moe/routing, which it is
// tested to equal. Ties go to the lower index, and what is not a number counts as the highest.
//
// Legend: E experts, K choices of a token, G groups, N experts of a group.
#include <algorithm>
#include <limits>
#include <vector>

#include "layers.h"
#include "pool.h"

enum Score : int64_t { SOFTMAX = 0, SIGMOID = 1 };
enum Weigh : int64_t { RAW = 0, NORMALISED = 1, SOFTMAX_OF_SELECTED = 2 };
enum GroupRule : int64_t { BEST = 1, BEST_TWO = 2 };

namespace {

constexpr float CLOSED = -std::numeric_limits<float>::infinity();

bool higher(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The ``k`` highest of ``n`` values in falling order.
std::vector<int64_t> highest(const float *values, int64_t n, int64_t k) {
    std::vector<int64_t> order(n);
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    auto before = [&](int64_t a, int64_t b) {
        return higher(values[a], values[b]) || (!higher(values[b], values[a]) && a < b);
    };
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    order.resize(k);
    return order;
}

void softmax(float *values, int64_t n) {
    float largest = CLOSED, total = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, values[i]);
    for (int64_t i = 0; i < n; ++i) total += values[i] = std::exp(values[i] - largest);
    for (int64_t i = 0; i < n; ++i) values[i] /= total;
}

// Closes what is outside the best groups (DeepSeek-V2 section 2.2.2, V3 section 2.1.2).
void keep_best_groups(const Route &r, float *values) {
    const int64_t each = r.experts / r.groups;
    std::vector<float> best(r.groups);
    for (int64_t g = 0; g < r.groups; ++g) {
        const float *own = values + g * each;
        const auto order = highest(own, each, r.group_rule == BEST_TWO ? 2 : 1);
        best[g] = own[order[0]];
        if (r.group_rule == BEST_TWO) best[g] += own[order[1]];
    }
    std::vector<bool> open(r.groups);
    for (const int64_t g : highest(best.data(), r.groups, r.keep_groups)) open[g] = true;
    for (int64_t e = 0; e < r.experts; ++e)
        if (!open[e / each]) values[e] = CLOSED;
}

// Weights of the chosen ones, from scores or logits without the bias.
void weigh(const Route &r, const float *logits, const float *scores, const int64_t *chosen, float *weights) {
    float total = 0;
    for (int64_t k = 0; k < r.choices; ++k) {
        weights[k] = (r.weigh == SOFTMAX_OF_SELECTED ? logits : scores)[chosen[k]];
        total += weights[k];
    }
    if (r.weigh == SOFTMAX_OF_SELECTED) softmax(weights, r.choices);
    for (int64_t k = 0; k < r.choices; ++k) {
        if (r.weigh == NORMALISED && total != 0) weights[k] /= total + static_cast<float>(r.epsilon);
        weights[k] *= static_cast<float>(r.scale);
    }
}

void find_second(const Route &r, const std::vector<float> &values, const std::vector<int64_t> &order, int64_t b) {
    int64_t second = -1;
    float last = -CLOSED;
    for (const int64_t e : order) last = std::min(last, values[e]);
    for (int64_t e = 0; e < r.experts; ++e) {
        const bool used = std::find(order.begin(), order.end(), e) != order.end();
        if (!used && values[e] > (second < 0 ? CLOSED : values[second])) second = e;
    }
    r.second[b] = second;
    r.margin[b] = second < 0 ? 0.0f : last - values[second];
}

void choose(const Route &r, const float *logits, int64_t b) {
    std::vector<float> scores(logits, logits + r.experts);
    if (r.score == SOFTMAX) softmax(scores.data(), r.experts);
    else
        for (float &score : scores) score = 1.0f / (1.0f + std::exp(-score));
    std::vector<float> values = scores;
    for (int64_t e = 0; r.bias && e < r.experts; ++e) values[e] += r.bias[e];
    const std::vector<float> compared = values;
    if (r.group_rule) keep_best_groups(r, values.data());
    const auto order = highest(values.data(), r.experts, r.choices);
    int64_t *chosen = r.chosen + b * r.choices;
    std::copy(order.begin(), order.end(), chosen);
    if (r.second) find_second(r, compared, order, b);
    weigh(r, logits, scores.data(), chosen, r.weights + b * r.choices);
}

}  // namespace

void route(const Pass &p, const Route &r) {
    std::vector<float> logits(p.tokens * r.experts);
    Active x(p.normed, p.tokens, p.hidden, p.many);
    team().run(static_cast<int>(p.threads), [&](Team::Member &member) {
        pack(member, exact_way(x), x);
        member.loop(r.experts, 16, [&](int64_t begin, int64_t end) {
            std::vector<float *> to(p.tokens);
            for (int64_t b = 0; b < p.tokens; ++b) to[b] = logits.data() + b * r.experts + begin;
            multiply(r.gate, begin, end, exact_way(x), x, to.data());
        });
        member.loop(p.tokens, 1, [&](int64_t b, int64_t) { choose(r, logits.data() + b * r.experts, b); });
    });
    for (int64_t i = 0; i < p.tokens * r.choices; ++i) ++r.counts[r.chosen[i]];
}
