// Linear layers over weights packed once, as a team of threads computes them: panels of 32 columns.
// Columns beyond the last one repeat it.
//
// Weights are of the activations' type, or int8 with one scale a column. int8 weights meet activations that were
// quantised with one scale for each group of 64; such a panel is, for each group, [32] corrections for the zero point
// of the activations (int32) and then the group's words. The columns of a gated weight alternate: 16 of the gate, the
// 16 of the other half that they are multiplied with.
#pragma once

#include "api.h"
#include "panel.h"
#include "rows.h"
#include "team.h"

namespace headrace {

// As kernels/linear.py fills it.
struct LinearWeight {
    const void* packed;
    const float* bias;    // for each packed column, or null
    const float* scales;  // for each packed column; null where the weight is of the activations' type
    int64_t in_features, out_features;
    int64_t gated;  // 1: out_features columns of a gate and as many of what it is multiplied with

    bool is_int8() const { return scales != nullptr; }
    int64_t panels() const {
        const int64_t columns = gated ? kLanes : kPanelColumns;
        return (out_features + columns - 1) / columns;
    }
};

template <typename W>
constexpr int64_t panel_words(int64_t in_features) {
    const int64_t corrections = sizeof(W) == 1 ? groups_in(in_features) : 0;
    return (words_in<W>(in_features) + corrections) * kPanelColumns;
}

// Activations as the kernels read them. `scales` ([rows][groups]) only where they are quantised.
struct Activations {
    const word* words;
    int64_t stride;
    const float* scales;
    int64_t groups;
};

// The sums of one tile: rows of x times one panel.
struct Tile {
    int64_t first_row, rows, panel;
    alignas(64) float sums[kRowTile][kPanelColumns];
};

// Fills in the sums of tile.rows rows. `next_panel` is what will be read after this tile. Compiled in linear_tile.cpp.
template <typename W>
void multiply_tile(Tile& tile, const LinearWeight& weight, const Activations& x, const word* panel, Ahead next_panel);

extern template void multiply_tile<float>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);
extern template void multiply_tile<bf16>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);
extern template void multiply_tile<int8_t>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);

// Computes this thread's share of x * weight; use(tile) takes each tile's sums.
template <typename W, typename Use>
void multiply_share(const Team& team, const LinearWeight& weight, const Activations& x, int64_t rows, Use&& use) {
    constexpr int64_t kRowBlockBytes = 256 << 10;  // rows of x that stay in a core's L2 while panels stream past
    const int64_t fitting = kRowBlockBytes / (x.stride * (int64_t)sizeof(word)) / kRowTile * kRowTile;
    const int64_t block_rows = std::max<int64_t>(fitting, kRowTile), blocks = (rows + block_rows - 1) / block_rows;
    const int64_t words = panel_words<W>(weight.in_features), panels = weight.panels();
    const Range share = team.share(blocks * panels);
    Tile tile;
    for (int64_t item = share.begin; item < share.end; ++item) {
        const int64_t block = item / panels, first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        tile.panel = item % panels;
        const word* panel = (const word*)weight.packed + tile.panel * words;
        const int64_t tiles = (count + kRowTile - 1) / kRowTile;  // the next panel is fetched in as many parts
        Ahead ahead{(const char*)(panel + words), ((int64_t)sizeof(word) * kPanelColumns + tiles - 1) / tiles};
        for (int64_t i = 0; i < tiles; ++i) {
            tile.first_row = first + count * i / tiles;
            tile.rows = first + count * (i + 1) / tiles - tile.first_row;
            multiply_tile<W>(tile, weight, x, panel, ahead);
            ahead.next += ahead.step * words_in<W>(weight.in_features);
            use(tile);
        }
    }
}

// Room for quantised activations.
struct QuantizedRows {
    uint8_t* bytes;  // [rows][in_features, up to a whole word]
    float* scales;   // [rows][groups]
};

// This thread's share of weight applied to x ([rows][in_features]). The team waits inside where x must be quantised
// first; before anybody uses the results it has to wait again.
template <typename T, typename Use>
void apply_linear(const Team& team, const LinearWeight& weight, const T* x, int64_t rows, const QuantizedRows& room,
                  Use&& use) {
    const int64_t size = weight.in_features;
    if (!weight.is_int8()) {
        return multiply_share<T>(team, weight, {(const word*)x, words_in<T>(size), nullptr, 0}, rows, use);
    }
    const int64_t words = words_in<int8_t>(size), groups = groups_in(size);
    const Range share = team.share(rows);
    for (int64_t row = share.begin; row < share.end; ++row) {
        quantize_row(x + row * size, room.bytes + row * words * (int64_t)sizeof(word), room.scales + row * groups, size);
    }
    team.wait();
    multiply_share<int8_t>(team, weight, {(const word*)room.bytes, words, room.scales, groups}, rows, use);
}

// What becomes of the sums. Each is rounded to T where separate operations would round it.

template <typename T>
struct StoreTo {
    T* out;
    int64_t stride;

    void operator()(const Tile& tile) const {
        const int64_t column = tile.panel * kPanelColumns, columns = stride - column;
        for (int64_t row = 0; row < tile.rows; ++row) {
            T* target = out + (tile.first_row + row) * stride + column;
            store(target, load(tile.sums[row]), columns);
            if (columns > kLanes) store(target + kLanes, load(tile.sums[row] + kLanes), columns - kLanes);
        }
    }
};

template <typename T>
struct AddTo {
    T* residual;
    int64_t stride;

    void operator()(const Tile& tile) const {
        const int64_t first = tile.panel * kPanelColumns;
        for (int64_t row = 0; row < tile.rows; ++row) {
            for (int half = 0; half < kPanelColumns && first + half < stride; half += kLanes) {
                T* target = residual + (tile.first_row + row) * stride + first + half;
                const int64_t columns = stride - first - half;
                store(target, round_to<T>(load(tile.sums[row] + half)) + load(target, columns), columns);
            }
        }
    }
};

template <typename T>
struct GateTo {
    T* out;
    int64_t stride;

    void operator()(const Tile& tile) const {
        const int64_t column = tile.panel * kLanes;
        for (int64_t row = 0; row < tile.rows; ++row) {
            const f32x16 gate = round_to<T>(load(tile.sums[row])), up = round_to<T>(load(tile.sums[row] + kLanes));
            store(out + (tile.first_row + row) * stride + column, silu_times<T>(gate, up), stride - column);
        }
    }
};

}  // namespace headrace
