// One thread's working memory for pieces of attention, and the walk of a piece over its span of the context.
//
// Flash style: the span is read in chunks of 64 tokens, straight from the paged cache, and folded into a running
// maximum, sum and output. Tiles of tiled pages are used where they lie; those of plain pages are packed first.
#pragma once

#include <cmath>

#include "attention_plan.h"

namespace headrace {

constexpr int64_t kHeadsAhead = 2;  // how early memory is asked for; one comes too late, measured 8 % slower

template <typename T>
class AttentionWorker {
  public:
    explicit AttentionWorker(const AttentionPlan<T>& plan)
        : head_dim_(plan.view().head_dim),
          padded_dim_(plan.padded_dim()),
          positions_(plan.max_rows()),
          query_(plan.max_rows() * head_dim_),
          keys_(words_in<T>(head_dim_) * kChunk),
          values_(words_in<T>(kChunk) * padded_dim_),
          weights_(kTileRows * kChunk),
          outputs_(plan.max_rows() * padded_dim_),
          maxima_(plan.max_rows()),
          sums_(plan.max_rows() * kLanes),
          merged_(padded_dim_),
          zeros_(head_dim_ + kLanes) {
        std::fill_n((char*)zeros_.data(), (head_dim_ + kLanes) * sizeof(T), 0);
    }

    // Leaves the unnormalised output, maximum and sum of every row in this worker. Memory is asked for some heads
    // ahead: on the last chunk, for the first one of `after`, which this thread will probably run next.
    void run(const AttentionCall<T>& call, const Piece& piece, const Piece& after);

    const float* output(int64_t row) const { return outputs_.data() + row * padded_dim_; }
    float maximum(int64_t row) const { return maxima_.data()[row]; }
    float sum(int64_t row) const {
        return across_lanes(load(sums_.data() + row * kLanes), [](f32x16 a, f32x16 b) { return a + b; })[0];
    }
    float* merge_buffer() { return merged_.data(); }

    int64_t runs() const { return runs_; }
    void end_run() { ++runs_; }

  private:
    // Up to 64 tokens of the context, from a multiple of 64.
    struct Chunk {
        int64_t begin, count;
        int64_t keys[kChunkGroups];  // where the keys of each 16 tokens begin, for KV head 0
    };

    void start(const AttentionCall<T>& call, const Piece& piece) {
        const int64_t group = call.group(), rows = piece.num_rows(group);
        rows_ = piece.num_queries * group;
        for (int64_t row = 0; row < rows_; ++row) {
            positions_.data()[row] = (int32_t)(piece.first_position + row / group);
        }
        T* target = query_.data();
        for (int64_t head = piece.first_head; head < piece.first_head + piece.num_heads; ++head) {
            for (int64_t token = 0; token < piece.num_queries; ++token, target += group * head_dim_) {
                const int64_t flat = call.query_starts[piece.sequence] + piece.first_query + token;
                std::memcpy(target, call.query + flat * call.query_stride + head * group * head_dim_,
                            group * head_dim_ * sizeof(T));
            }
        }
        std::fill_n(outputs_.data(), rows * padded_dim_, 0.0f);
        std::fill_n(maxima_.data(), rows, kNothingSeen);
        std::fill_n(sums_.data(), rows * kLanes, 0.0f);
    }

    Chunk locate(const AttentionCall<T>& call, const Piece& piece, int64_t begin) const {
        Chunk chunk{begin, std::clamp<int64_t>(piece.end - begin, 0, kChunk), {}};
        const int64_t block_size = call.view.block_size;
        const int32_t* block = call.block_tables + piece.sequence * call.max_blocks + begin / block_size;
        int64_t offset = begin % block_size;
        for (int64_t group = 0; group * kGroup < chunk.count; ++group, offset += kGroup) {
            for (; offset >= block_size; offset -= block_size) ++block;
            chunk.keys[group] = call.view.page_offset(*block, 0) + offset * call.view.token_stride;
        }
        // Groups beyond the end are masked, but must be memory.
        for (int64_t group = round_up(chunk.count, kGroup) / kGroup; group < kChunkGroups; ++group) {
            chunk.keys[group] = chunk.keys[0];
        }
        return chunk;
    }

    // Where the tiles of one head lie in tiled pages (in plain ones: some of its keys and values, to ask for early).
    Tiles raw_tiles(const AttentionCall<T>& call, const Chunk& chunk, int64_t head) const {
        Tiles tiles;
        for (int group = 0; group < kChunkGroups; ++group) {
            const T* keys = call.cache + chunk.keys[group] + head * call.view.head_stride;
            tiles.keys[group] = (const word*)keys;
            tiles.values[group] = (const word*)(keys + call.view.value_offset);
        }
        return tiles;
    }

    Tiles tiles_of(const AttentionCall<T>& call, const Piece& piece, const Chunk& chunk, int64_t head) {
        if (!call.view.tiled) return pack(call, piece, chunk, head);
        Tiles tiles = raw_tiles(call, chunk, piece.first_head + head);
        const int64_t last = (chunk.count - 1) / kGroup;
        if constexpr (sizeof(T) == 2) {
            if (chunk.count % 2) tiles.values[last] = without_stale(tiles.values[last], chunk.count - last * kGroup);
        }
        return tiles;
    }

    // The values of a group of which an odd number of tokens exists. What the cache holds beyond them is stale, perhaps
    // NaN, which would survive a weight of 0.
    const word* without_stale(const word* values, int64_t count) {
        word* target = values_.data();
        std::memcpy(target, values, (count + 1) / 2 * head_dim_ * sizeof(word));
        word* last = target + count / 2 * head_dim_;
        for (int64_t dim = 0; dim < head_dim_; ++dim) last[dim] &= 0xffff;
        return target;
    }

    void attend_head(const AttentionCall<T>& call, const Chunk& chunk, int64_t head, const Tiles& tiles,
                     const Tiles& next) {
        const int64_t num_tiles = (rows_ + kTileRows - 1) / kTileRows;
        const int64_t height = rows_ / num_tiles, higher_tiles = rows_ % num_tiles;
        for (int64_t tile = 0, first = 0, end; tile < num_tiles; ++tile, first = end) {
            end = first + height + (tile < higher_tiles);
            const int64_t columns = std::min<int64_t>(chunk.count, positions_.data()[end - 1] + 1 - chunk.begin);
            if (columns <= 0) continue;
            const Tiles& ahead = tile == 0 ? next : tiles;
            with_constant<kTileRows>(end - first, first, [&](auto num_rows, int64_t) {
                const RowSpan span{head * rows_ + first, positions_.data() + first, columns};
                if (columns > 3 * kGroup) {
                    attend_tile<num_rows, 4>(call, chunk, span, tiles, ahead);
                } else if (columns > 2 * kGroup) {
                    attend_tile<num_rows, 3>(call, chunk, span, tiles, ahead);
                } else if (columns > kGroup) {
                    attend_tile<num_rows, 2>(call, chunk, span, tiles, ahead);
                } else {
                    attend_tile<num_rows, 1>(call, chunk, span, tiles, ahead);
                }
            });
        }
    }

    // The rows of a tile.
    struct RowSpan {
        int64_t first_row;         // in this worker
        const int32_t* positions;  // of each row's query token in the context
        int64_t columns;           // how much of the chunk the last row sees
    };

    template <int Rows, int Groups>
    void attend_tile(const AttentionCall<T>& call, const Chunk& chunk, const RowSpan& span, const Tiles& tiles,
                     const Tiles& next) {
        const RowStates states{outputs_.data(), maxima_.data(), sums_.data(), padded_dim_};
        const int64_t words = words_in<T>(head_dim_), first_row = span.first_row;
        f32x16 scores[Rows][Groups];
        score_rows<T>(scores, (const word*)query_.data() + first_row * words, words, tiles, next);
        const int64_t all_columns = std::min<int64_t>(chunk.count, span.positions[0] + 1 - chunk.begin);
        const bool masked = call.window || all_columns < Groups * kGroup;
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row) {
            if (masked) {
                const int64_t position = span.positions[row] - chunk.begin;
                mask_row(scores[row], call.window ? (int32_t)(position - call.window + 1) : 0,
                         (int32_t)std::min(chunk.count, position + 1));
            }
            weigh_row(weights_.data() + row * kChunk, scores[row], call.scale * kLog2E, states, first_row + row);
        }
        const int64_t token_words = (span.columns * (int64_t)sizeof(T) + 3) / 4;
        for (int64_t dim = 0; dim < padded_dim_;) {
            const auto add = [&](auto vectors) {
                add_values<T, Rows, vectors>(states, first_row, weights_.data(), dim, token_words, value_stride(call),
                                             tiles, next);
                dim += vectors * kLanes;
            };
            if (padded_dim_ - dim >= 4 * kLanes) {
                add(std::integral_constant<int, 4>{});
            } else if (padded_dim_ - dim >= 2 * kLanes) {
                add(std::integral_constant<int, 2>{});
            } else {
                add(std::integral_constant<int, 1>{});
            }
        }
    }

    int64_t value_stride(const AttentionCall<T>& call) const { return call.view.tiled ? head_dim_ : padded_dim_; }

    // Plain pages: the chunk's keys and values of one head as tiles in this worker's memory.
    Tiles pack(const AttentionCall<T>& call, const Piece& piece, const Chunk& chunk, int64_t head) {
        Tiles tiles = raw_tiles(call, chunk, piece.first_head + head);
        const CacheView& view = call.view;
        const bool dense = view.token_stride == head_dim_ && head_dim_ == padded_dim_;
        const bool values_are_tiles = sizeof(T) == 4 && dense && view.block_size % kGroup == 0;
        for (int64_t first = 0; first < chunk.count; first += kGroup) {
            const T* keys[kGroup];
            const int64_t count = std::min<int64_t>(kGroup, chunk.count - first);
            locate_tokens(call, piece, chunk.begin + first, count, piece.first_head + head, keys);
            const int64_t group = first / kGroup;
            word* key_tile = keys_.data() + first * words_in<T>(head_dim_);
            pack_key_tile(keys, head_dim_, key_tile);
            tiles.keys[group] = key_tile;
            if (values_are_tiles) continue;
            word* value_tile = values_.data() + words_in<T>(first) * padded_dim_;
            for (const T*& row : keys) row += row == zeros_.data() ? 0 : view.value_offset;
            pack_value_tile(keys, head_dim_, padded_dim_, value_tile);
            tiles.values[group] = value_tile;
        }
        return tiles;
    }

    // Where the keys of 16 tokens lie. Those past the end are zeros, not stale cache memory (see without_stale).
    void locate_tokens(const AttentionCall<T>& call, const Piece& piece, int64_t begin, int64_t count, int64_t head,
                       const T* (&keys)[kGroup]) const {
        const CacheView& view = call.view;
        const int32_t* table = call.block_tables + piece.sequence * call.max_blocks;
        for (int64_t i = 0; i < kGroup; ++i) {
            const int64_t token = begin + i;
            if (i < count) {
                keys[i] = call.cache + view.page_offset(table[token / view.block_size], head) +
                          token % view.block_size * view.token_stride;
            } else {
                keys[i] = zeros_.data();
            }
        }
    }

    int64_t head_dim_, padded_dim_, rows_ = 0, runs_ = 0;  // rows of one KV head; by heads, they are [head][rows]
    Buffer<int32_t> positions_;       // [rows of a head], of each row's query token in the context
    Buffer<T> query_;                 // [head][rows][head_dim]
    Buffer<uint32_t> keys_, values_;  // the tiles of a chunk of plain pages
    Buffer<T> weights_;               // [kTileRows][kChunk]
    Buffer<float> outputs_;           // [head][rows][padded_dim]
    Buffer<float> maxima_, sums_;     // [head][rows], [head][rows][16]
    Buffer<float> merged_;            // [padded_dim]
    Buffer<T> zeros_;                 // one row of the cache that holds nothing
};

template <typename T>
void AttentionWorker<T>::run(const AttentionCall<T>& call, const Piece& piece, const Piece& after) {
    start(call, piece);
    Chunk chunk = locate(call, piece, piece.begin);
    while (chunk.begin < piece.end) {
        const bool last = chunk.begin + kChunk >= piece.end;
        const Piece& source = last ? after : piece;
        const Chunk following = locate(call, source, last ? after.begin : chunk.begin + kChunk);
        for (int64_t head = 0; head < piece.num_heads; ++head) {
            const Tiles tiles = tiles_of(call, piece, chunk, head);
            const int64_t ahead = head + kHeadsAhead, beyond = ahead - piece.num_heads;
            const Tiles next = beyond < 0 ? raw_tiles(call, chunk, piece.first_head + ahead)
                                          : raw_tiles(call, following, source.first_head +
                                                                           std::min(beyond, source.num_heads - 1));
            attend_head(call, chunk, head, tiles, next);
        }
        if (last) break;
        chunk = following;
    }
}

// Compiled once, in attention.cpp, whoever uses it: this is most of what there is to compile. `run`, which reaches all
// the rest, stands outside of the class because what is inline would be compiled again.
extern template class AttentionWorker<float>;
extern template class AttentionWorker<bf16>;

}  // namespace headrace
