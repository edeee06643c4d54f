// What all exported functions share. Each is `extern "C" int headrace_<op>_<f32|bf16>(...)` and returns a Status.
#pragma once

#include <algorithm>
#include <cstdint>

namespace headrace {

enum Status : int {
    kOk = 0,
    kIndexOutOfRange = 1,  // a block id or slot is not in the cache
    kBadLengths = 2,       // query starts, context lengths and block tables do not fit together
};

// Waking a thread costs some microseconds: all or one, by whether each would have this many elements to work on. A team of
// another size would end the surplus threads, and the next call start them again.
inline int threads_for(int64_t elements, int threads) {
    constexpr int64_t kElementsPerThread = 16384;
    return elements >= kElementsPerThread * threads ? threads : 1;
}

// Where one layer of the paged KV cache lies, and how a page (the keys or the values of one block and head) stores its
// tokens: plain or tiled (pages.h). Strides are in elements; a value page stands value_offset after its key page.
struct CacheView {
    int64_t num_blocks, block_size, num_kv_heads, head_dim;
    int64_t block_stride, value_offset, head_stride, token_stride;
    int64_t tiled;

    int64_t page_offset(int64_t block, int64_t head) const { return block * block_stride + head * head_stride; }
    int64_t num_slots() const { return num_blocks * block_size; }
};

}  // namespace headrace
