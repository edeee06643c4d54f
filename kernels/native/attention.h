// Paged attention as a team of threads runs it: one plan a step, one worker a thread, one run a layer.
//
//     AttentionPlan<T> plan(call, num_sequences, threads);            once: cuts the batch into pieces
//     AttentionWorker<T> worker(plan);                                on each thread: its working memory
//     run_attention(plan, call_of_the_layer, worker);                 on each thread, layer by layer
//
// The keys and values must be written before any thread runs a layer, and its output is complete when all threads have
// returned: the caller has a barrier before and after. Calls of a plan differ in nothing but query, cache and out.
#pragma once

#include "attention_plan.h"
#include "attention_worker.h"

namespace headrace {

// kOk, or what is wrong with the lengths and block tables of a call.
template <typename T>
Status check_attention(const AttentionCall<T>& call, int64_t num_sequences, int64_t num_tokens) {
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

// A piece's results: into the output, or, of one span of several, beside those of the others.
template <typename T>
void keep_result(AttentionPlan<T>& plan, const AttentionCall<T>& call, const Piece& piece,
                 const AttentionWorker<T>& worker) {
    const int64_t head_dim = call.view.head_dim;
    for (int64_t row = 0; row < piece.num_rows(call.group()); ++row) {
        const float* output = worker.output(row);
        if (piece.cut < 0) {
            const float inverse = 1.0f / worker.sum(row);
            T* target = output_row(call, piece, row);
            for (int64_t i = 0; i < head_dim; i += kLanes) store(target + i, load(output + i) * inverse, head_dim - i);
        } else {
            Partial partial = plan.partial(piece, piece.span, row);
            std::memcpy(partial.output, output, head_dim * sizeof(float));
            *partial.maximum = worker.maximum(row);
            *partial.sum = worker.sum(row);
        }
    }
}

// All spans of a cut, in their order, into the output.
template <typename T>
void merge_spans(AttentionPlan<T>& plan, const AttentionCall<T>& call, const Piece& piece, int64_t num_spans,
                 AttentionWorker<T>& worker) {
    const int64_t head_dim = call.view.head_dim;
    float* merged = worker.merge_buffer();
    for (int64_t row = 0; row < piece.num_rows(call.group()); ++row) {
        float maximum = kNothingSeen, total = 0;
        for (int64_t s = 0; s < num_spans; ++s) maximum = std::max(maximum, *plan.partial(piece, s, row).maximum);
        std::fill_n(merged, plan.padded_dim(), 0.0f);
        for (int64_t s = 0; s < num_spans; ++s) {
            const Partial part = plan.partial(piece, s, row);
            const float factor = std::exp2((*part.maximum - maximum) * call.scale * kLog2E);
            total += *part.sum * factor;
            for (int64_t i = 0; i < head_dim; i += kLanes) {
                store(merged + i, load(merged + i) + load(part.output + i) * factor);
            }
        }
        T* target = output_row(call, piece, row);
        for (int64_t i = 0; i < head_dim; i += kLanes) {
            store(target + i, load(merged + i) * (1.0f / total), head_dim - i);
        }
    }
}

template <typename T>
void run_attention(AttentionPlan<T>& plan, const AttentionCall<T>& call, AttentionWorker<T>& worker) {
    while (const Piece* piece = plan.take(worker.runs())) {
        worker.run(call, *piece, plan.likely_after(*piece));
        keep_result(plan, call, *piece, worker);
        if (piece->cut >= 0 && plan.is_last_span(*piece)) {
            merge_spans(plan, call, *piece, plan.num_spans(*piece), worker);
        }
    }
    worker.end_run();
}

extern template void run_attention(AttentionPlan<float>&, const AttentionCall<float>&, AttentionWorker<float>&);
extern template void run_attention(AttentionPlan<bf16>&, const AttentionCall<bf16>&, AttentionWorker<bf16>&);

}  // namespace headrace
