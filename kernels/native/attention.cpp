// Paged attention: cuts a batch into pieces, gives them to the threads, and merges contexts that were cut into spans.
#include <vector>

#include "attention.h"

namespace headrace {
namespace {

constexpr int64_t kPieceRows = 96;    // query rows of a piece: enough to repay the packing of the keys and values
constexpr int64_t kPiecesPerThread = 4;
constexpr int64_t kMinSpan = 256;     // shorter spans cost more in merging than they win in balance

template <typename T>
Status check(const AttentionCall<T>& call, int64_t num_sequences, int64_t num_tokens) {
    if (call.query_starts[0] != 0 || call.query_starts[num_sequences] != num_tokens) return kBadLengths;
    for (int64_t s = 0; s < num_sequences; ++s) {
        const int64_t query_len = call.query_starts[s + 1] - call.query_starts[s], context_len = call.context_lens[s];
        const int64_t blocks = (context_len + call.view.block_size - 1) / call.view.block_size;
        if (query_len < 0 || context_len < query_len || blocks > call.max_blocks) return kBadLengths;
        const int32_t* table = call.block_tables + s * call.max_blocks;
        for (int64_t block = 0; block < blocks; ++block) {
            if (table[block] < 0 || table[block] >= call.view.num_blocks) return kIndexOutOfRange;
        }
    }
    return kOk;
}

// The rows of several pieces whose spans make up one context.
struct Cut {
    Piece whole;
    int64_t num_spans;
};

struct Plan {
    std::vector<Piece> pieces;  // the longest spans first, so that no thread ends on one
    std::vector<Cut> cuts;
    int64_t partial_rows = 0;
    int64_t max_rows = 0;
};

// Pieces over the whole of their contexts.
template <typename T>
std::vector<Piece> whole_pieces(const AttentionCall<T>& call, int64_t num_sequences) {
    std::vector<Piece> pieces;
    const int64_t queries = std::max<int64_t>(1, kPieceRows / call.group());
    for (int64_t s = 0; s < num_sequences; ++s) {
        const int64_t query_len = call.query_starts[s + 1] - call.query_starts[s];
        const int64_t cached = call.context_lens[s] - query_len;
        for (int64_t first = 0; first < query_len; first += queries) {
            const int64_t count = std::min(queries, query_len - first), position = cached + first;
            for (int64_t head = 0; head < call.view.num_kv_heads; ++head) {
                pieces.push_back({s, head, first, count, position, call.context_begin(position), position + count, -1});
            }
        }
    }
    return pieces;
}

template <typename T>
Plan make_plan(const AttentionCall<T>& call, int64_t num_sequences, int threads) {
    Plan plan;
    const std::vector<Piece> whole = whole_pieces(call, num_sequences);
    const int64_t wanted = threads > 1 ? kPiecesPerThread * threads / (int64_t)(whole.size() + 1) + 1 : 1;
    for (const Piece& piece : whole) {
        const int64_t rows = piece.num_queries * call.group(), length = piece.end - piece.begin;
        const int64_t spans = std::clamp<int64_t>(length / kMinSpan, 1, wanted);
        plan.max_rows = std::max(plan.max_rows, rows);
        if (spans == 1) {
            plan.pieces.push_back(piece);
            continue;
        }
        Piece part = piece;
        part.partial = plan.partial_rows;
        plan.cuts.push_back({part, spans});
        for (int64_t span = 0; span < spans; ++span, part.partial += rows) {
            part.begin = piece.begin + length * span / spans;
            part.end = piece.begin + length * (span + 1) / spans;
            plan.pieces.push_back(part);
        }
        plan.partial_rows = part.partial;
    }
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [](const Piece& a, const Piece& b) {
        return (a.end - a.begin) * a.num_queries > (b.end - b.begin) * b.num_queries;
    });
    return plan;
}

template <typename T>
T* output_row(const AttentionCall<T>& call, const Piece& piece, int64_t row) {
    const int64_t group = call.group();
    const int64_t token = call.query_starts[piece.sequence] + piece.first_query + row / group;
    return call.out + (token * call.num_heads + piece.kv_head * group + row % group) * call.view.head_dim;
}

template <typename T>
void write_result(const AttentionCall<T>& call, const Piece& piece, const PieceWorker<T>& worker) {
    const int64_t head_dim = call.view.head_dim;
    for (int64_t row = 0; row < worker.rows(); ++row) {
        const float inverse = 1.0f / worker.sum_of(row);
        T* target = output_row(call, piece, row);
        for (int64_t i = 0; i < head_dim; i += kLanes) {
            store(target + i, load(worker.output(row) + i) * inverse, head_dim - i);
        }
    }
}

// A partial row is its output, then its maximum, then its sum.
template <typename T>
void keep_partial(const AttentionCall<T>& call, const Piece& piece, const PieceWorker<T>& worker, float* partials) {
    const int64_t head_dim = call.view.head_dim;
    for (int64_t row = 0; row < worker.rows(); ++row) {
        float* target = partials + (piece.partial + row) * (head_dim + 2);
        std::copy_n(worker.output(row), head_dim, target);
        target[head_dim] = worker.maximum_of(row);
        target[head_dim + 1] = worker.sum_of(row);
    }
}

template <typename T>
void merge(const AttentionCall<T>& call, const Cut& cut, const float* partials) {
    const int64_t head_dim = call.view.head_dim, rows = cut.whole.num_queries * call.group();
    const int64_t span_stride = rows * (head_dim + 2);
    std::vector<float> merged(head_dim);
    for (int64_t row = 0; row < rows; ++row) {
        const float* first = partials + (cut.whole.partial + row) * (head_dim + 2);
        float maximum = kNothingSeen, total = 0;
        for (int64_t s = 0; s < cut.num_spans; ++s) maximum = std::max(maximum, first[s * span_stride + head_dim]);
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (int64_t s = 0; s < cut.num_spans; ++s) {
            const float* part = first + s * span_stride;
            const float factor = std::exp(part[head_dim] - maximum);
            total += part[head_dim + 1] * factor;
            for (int64_t i = 0; i < head_dim; ++i) merged[i] += part[i] * factor;
        }
        T* target = output_row(call, cut.whole, row);
        for (int64_t i = 0; i < head_dim; i += kLanes) {
            store(target + i, load(merged.data() + i, head_dim - i) * (1.0f / total), head_dim - i);
        }
    }
}

template <typename T>
int paged_attention(const AttentionCall<T>& call, int64_t num_sequences, int64_t num_tokens, int threads) {
    const Status status = check(call, num_sequences, num_tokens);
    if (status != kOk) return status;
    const Plan plan = make_plan(call, num_sequences, threads);
    std::vector<float> partials(plan.partial_rows * (call.view.head_dim + 2));
#pragma omp parallel num_threads(threads)
    {
        PieceWorker<T> worker(call, plan.max_rows);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < plan.pieces.size(); ++i) {
            worker.run(plan.pieces[i]);
            if (plan.pieces[i].partial < 0) {
                write_result(call, plan.pieces[i], worker);
            } else {
                keep_partial(call, plan.pieces[i], worker, partials.data());
            }
        }
#pragma omp for schedule(static)
        for (size_t i = 0; i < plan.cuts.size(); ++i) merge(call, plan.cuts[i], partials.data());
    }
    return kOk;
}

}  // namespace
}  // namespace headrace

#define DEFINE(SUFFIX, T)                                                                                             \
    extern "C" int headrace_paged_attention_##SUFFIX(                                                                 \
        const void* query, const void* cache, void* out, const int32_t* query_starts, const int32_t* context_lens,    \
        const int32_t* block_tables, int64_t num_sequences, int64_t num_tokens, int64_t max_blocks,                   \
        int64_t num_heads, int64_t query_stride, float scale, int64_t window, const headrace::CacheView* view,        \
        int threads) {                                                                                                \
        const headrace::AttentionCall<T> call{(const T*)query, (const T*)cache, (T*)out,   query_starts,              \
                                              context_lens,    block_tables,    max_blocks, num_heads,                \
                                              query_stride,    scale,           window,    *view};                    \
        return headrace::paged_attention(call, num_sequences, num_tokens, threads);                                   \
    }
DEFINE(f32, float)
DEFINE(bf16, headrace::bf16)
