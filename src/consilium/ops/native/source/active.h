// Activations, and what products read of them: as they are, or packed once for all rows of a matrix.
//
// Legend: n values of an activation, T activations.
#pragma once

#include <algorithm>
#include <vector>

#include "bands.h"
#include "pairs.h"
#include "panels.h"
#include "steps.h"
#include "tiles.h"

// How a product is taken. Of few activations each is summed as if it were alone; many are a part of a prompt,
// which always has the same neighbours.
enum Way { FLOATS, INTEGERS8, INTEGERS4, TILES, PANELS, WAYS };

class Active {
  public:
    bool many = false;
    int64_t width = 0;               // n
    std::vector<const float *> at;   // of each, n values

    Active() = default;
    Active(const float *x, int64_t tokens, int64_t n, bool many) : many(many), width(n), at(tokens) {
        for (int64_t b = 0; b < tokens; ++b) at[b] = x + b * n;
    }
    int64_t tokens() const { return static_cast<int64_t>(at.size()); }

    // Makes room for what ``way`` reads, before any pack.
    void want(Way way) {
        if (way == INTEGERS8 && !eight.size()) eight.reserve(tokens(), width);
        if (way == INTEGERS4 && !four.size()) four.reserve(tokens(), width);
        if (way == TILES) tiles.want(tile_values(tokens(), width));
        if (way == PANELS) panels.want(panel_values(tokens(), width));
    }

    // Whether integers are there, which others packed.
    bool holds(Way way) const { return way == INTEGERS8 ? eight.size() : way == INTEGERS4 ? four.size() : false; }

    // How many parts ``pack`` has, which threads may share.
    static constexpr int64_t PART = 32;
    int64_t parts() const { return (tokens() + PART - 1) / PART; }

    void pack(Way way, int64_t part) {
        const int64_t begin = part * PART, end = std::min(begin + PART, tokens());
        if (way == INTEGERS8 || way == INTEGERS4)
            for (int64_t b = begin; b < end; ++b)
                way == INTEGERS8 ? eight.quantise(at[b], b) : four.quantise(at[b], b);
        if (way == TILES) pack_tiles(at.data() + begin, end - begin, width, tiles.data() + begin * tile_width(width));
        if (way == PANELS)
            for (int64_t b = begin; b < end; b += PANEL_TOKENS)
                pack_panel(at.data() + b, std::min<int64_t>(PANEL_TOKENS, end - b), width, panels.data() + b * width);
    }

    // The same activations at these places of ``all``, of which integers are taken over.
    static Active some(const Active &all, const std::vector<int64_t> &places) {
        Active found;
        found.many = all.many, found.width = all.width;
        for (const int64_t place : places) found.at.push_back(all.at[place]);
        found.eight = all.eight.some(places), found.four = all.four.some(places);
        return found;
    }

    Quantised<8> eight;
    Quantised<4> four;
    Buffer<Bfloat16> tiles;
    Buffer<float> panels;
};

// What products of ``way`` read, packed by the threads of a region.
template <class Member> static inline void pack(Member &member, Way way, Active &x) {
    if (way == FLOATS) return;
    member.loop(1, 1, [&](int64_t, int64_t) { x.want(way); });
    member.loop(x.parts(), 1, [&](int64_t part, int64_t) { x.pack(way, part); });
}

// The same by one thread.
static inline void pack_alone(Way way, Active &x) {
    x.want(way);
    for (int64_t part = 0; part < x.parts(); ++part) x.pack(way, part);
}
