// What the library's Python half calls.
#include <new>
#include <vector>

#include "rows.h"
#include "train.h"

extern "C" {

int64_t consilium_layer_size() { return sizeof(Layer); }
int64_t consilium_pass_size() { return sizeof(Pass); }
int64_t consilium_sorted_size() { return sizeof(Sorted); }
int64_t consilium_lanes() { return LANES; }

// Layers one after the other, as far as a router that the kernels do not know: returns how many are whole.
// Behind the last whole one, the first half of the next is done.
int64_t consilium_layers(const Pass *pass, const Layer *layers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        attend(*pass, layers[i].attend, layers[i].latent);
        if (layers[i].feed.experts && !layers[i].routed) return i;
        if (layers[i].routed) route(*pass, layers[i].route);
        feed(*pass, layers[i].feed);
    }
    return count;
}

void consilium_networks(const Pass *pass, const Feed *call, float *out) { networks(*pass, *call, out); }

// Whether there was memory for it.
int64_t consilium_sorted(const Sorted *call, int64_t threads) {
    try {
        sorted(*call, threads);
    } catch (const std::bad_alloc &) {
        return 0;
    }
    return 1;
}

void consilium_feed(const Pass *pass, const Feed *call) { feed(*pass, *call); }

// y [B][O] = x [B][I] times the matrix; ``many`` as in a Pass.
void consilium_product(const Matrix *matrix, const float *x, int64_t tokens, int64_t many, int64_t threads,
                       float *y) {
    Active active(x, tokens, matrix->columns, many);
    const Way way = way_of(matrix->type, active);
    team().run(static_cast<int>(threads), [&](Team::Member &member) {
        pack(member, way, active);
        const int64_t piece = piece_of(matrix->rows, threads, many);
        member.loop(matrix->rows, piece, [&](int64_t begin, int64_t end) {
            std::vector<float *> to(tokens);
            for (int64_t b = 0; b < tokens; ++b) to[b] = y + b * matrix->rows + begin;
            multiply(*matrix, begin, end, way, active, to.data());
        });
    });
}
}
