// The register kernels of linear layers: for each type of weight, one for each height of a tile.
#include "linear.h"

namespace headrace {
namespace {

template <typename W, int Rows>
void multiply_rows(Tile& tile, const LinearWeight& weight, const Activations& x, const word* panel, Ahead next_panel) {
    // Few rows only stream the weight, which the hardware foresees; measured, asking for more gets in its way.
    std::conditional_t<(Rows < 6), NothingAhead, Ahead> ahead;
    if constexpr (Rows >= 6) ahead = next_panel;
    const word* first = x.words + tile.first_row * x.stride;
    f32x16 sums[Rows][2] = {};
    if constexpr (sizeof(W) == 1) {
        const int64_t words = words_in<W>(weight.in_features);
        constexpr int64_t group_words = words_in<W>(kScaleGroup);
        for (int64_t group = 0; group < x.groups; ++group, first += group_words) {
            const int64_t count = std::min(group_words, words - group * group_words);
            const i32x16 left = (i32x16)load_words(panel), right = (i32x16)load_words(panel + kLanes);
            i32x16 products[Rows][2];
            for (auto& row : products) row[0] = left, row[1] = right;
            multiply_slice<W>(products, first, x.stride, panel + kPanelColumns, count, ahead);
            for (int row = 0; row < Rows; ++row) {
                const float scale = x.scales[(tile.first_row + row) * x.groups + group];
                sums[row][0] += __builtin_convertvector(products[row][0], f32x16) * scale;
                sums[row][1] += __builtin_convertvector(products[row][1], f32x16) * scale;
            }
            panel += (count + 1) * kPanelColumns;
        }
        const float* scales = weight.scales + tile.panel * kPanelColumns;
        for (auto& row : sums) row[0] *= load(scales), row[1] *= load(scales + kLanes);
    } else {
        multiply_panel<W>(sums, first, x.stride, panel, words_in<W>(weight.in_features), ahead);
    }
    if (weight.bias) {
        const float* bias = weight.bias + tile.panel * kPanelColumns;
        for (auto& row : sums) row[0] += load(bias), row[1] += load(bias + kLanes);
    }
    for (int row = 0; row < Rows; ++row) store(tile.sums[row], sums[row][0]), store(tile.sums[row] + kLanes, sums[row][1]);
}

}  // namespace

template <typename W>
void multiply_tile(Tile& tile, const LinearWeight& weight, const Activations& x, const word* panel, Ahead next_panel) {
    with_constant(tile.rows, 0, [&](auto rows, int64_t) {
        multiply_rows<W, decltype(rows)::value>(tile, weight, x, panel, next_panel);
    });
}

template void multiply_tile<float>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);
template void multiply_tile<bf16>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);
template void multiply_tile<int8_t>(Tile&, const LinearWeight&, const Activations&, const word*, Ahead);

}  // namespace headrace
