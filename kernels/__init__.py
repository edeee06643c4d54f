"""The arithmetic of a transformer step: one operation a file, torch tensors in, torch tensors out.

Every operation has a plain torch reference, which is its specification and runs on any device, and, where it pays, a
native CPU path in C++ (`native/`, built and loaded by `native_library`) and a Triton one for GPUs (`gpu/`). Operations are
for inference: they record no gradients.

| file | operation |
| --- | --- |
| attention_batch | `AttentionBatch`: which query tokens belong to which sequence, and where its KV blocks lie |
| paged_attention | `paged_attention`: decode rows and prefill chunks over the paged KV cache, in one call |
| kv_cache | the shape of the paged KV cache, checked and described to C++ |
| kv_scales | `KVScales`: what the keys and values of a quantised cache were divided by |
| kv_write | `write_kv`: store this step's keys and values in their cache slots |
| rotary | `apply_rotary`, and `rope_and_write_kv`, which rotates and stores in one pass |
| rms_norm | `rms_norm`, and `fused_add_rms_norm`, which adds the residual first |
| silu_mul | `silu_and_mul`: the gate of a SwiGLU feed-forward |
| linear | `PackedLinear`: a matrix product whose weight is packed once, at load |
| int8 | how weights and activations become int8, and the product's specification |
| weight_memory | where packed weights lie |
| llama_step | `LlamaStep`: a whole step of a Llama-family model in one C++ call |
| draw | `draw`: a token for each row of logits, by temperature, top-k, top-p and min-p |
| block_copy | whole KV blocks into one piece, out of it, and inside a cache |
| block_checksum | `block_checksums`: what the two ends of a hand-off compare |
| sampling | `sample_rows`: a token for each row of logits, with nothing asked of the device |
| sampling_tensors | `SamplingTensors`: the rows' sampling parameters, in tensors that stay |
| native_library | builds, loads and describes the C++ library |
"""
