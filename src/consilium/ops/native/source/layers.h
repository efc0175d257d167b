// The parts of a decoder layer, each given as one structure that the library's Python half fills in (library.py).
//
// Legend: B tokens, one new one of each sequence; K choices of a token, E experts, D hidden.
#pragma once

#include "values.h"

// Norm, projections, rotary positions, cache, attention, output projection, residual, and the next norm.
struct Attend {
    int64_t heads, kv_heads, key, nope, pairs, value, rank, interleaved, norm_each;
    int64_t window;  // slots that a token sees, its own included; 0: all up to its own
    double scale, softcap;
    Matrix query, query_up, keys, values, latent_up, output;
    Norm norm, query_norm, key_norm, post_norm, next_norm;
    void *storage;
    const int64_t *table;  // pages of each sequence; null: each owns the page of its number
    int64_t table_width, page, row, slots, cache_type;
};

// The gate, and which experts it chooses with what weight.
struct Route {
    int64_t experts, choices, groups, keep_groups, group_rule, score, weigh;
    double epsilon, scale;
    Matrix gate;        // products in float32 whatever its type
    const float *bias;  // [E]; shifts what is compared and weighs nothing; may be null
    int64_t *chosen;    // [B][K], written
    float *weights;     // [B][K], written
    int64_t *counts;    // [E], added to
    int64_t *second;    // [B], written: the best one that is not chosen, in whatever group; -1 for none; may be null
    float *margin;      // [B], written with it: how far it is behind the last one chosen
};

// The experts, the shared ones or the dense network, and the residual.
struct Feed {
    int64_t width, experts, choices, shared_width, activation, weight_on_input;
    Matrix up, down;  // of all experts, one below the other
    Matrix shared_up, shared_down, shared_gate;
    Norm post_norm;
    const int64_t *chosen;  // [B][K]
    const float *weights;   // [B][K]
    const uint8_t *keep;    // [B][K]; null: all
};

struct Layer {
    Attend attend;
    Route route;
    Feed feed;
    int64_t latent, routed;  // which attention; whether the kernels route
};

// What all layers of a pass share. States are float32 from the first layer to the last.
struct Pass {
    int64_t threads, tokens, hidden, many;  // many: the tokens are a part of a prompt
    float *x;       // [B][D], read and written
    float *normed;  // [B][D], behind the norm in front of the second half
    const float *cos, *sin;
    const int64_t *position;
};

void attend(const Pass &pass, const Attend &call, bool latent);
void route(const Pass &pass, const Route &call);
void feed(const Pass &pass, const Feed &call);

// The outputs of each choice of each token [B][K][D], then those of the network that all visit [B][D].
void networks(const Pass &pass, const Feed &call, float *out);
