"""Triton kernels for GPUs, one operation a file: why, kernel, launcher. The plain torch reference of each, which is its
specification, is in the file of the same operation in kernels/, and so is the public operation that checks its arguments
and comes here with tensors of a GPU.

Launchers depend on shapes alone: they read no tensor on the host and wait for nothing, so that all of them may be captured
into a CUDA graph. With TRITON_INTERPRET=1, set before this package is imported, the same kernels run on CPU tensors.

| file | operation |
| --- | --- |
| paged_attention | sends the sequences of a batch to the one or the other of the next two |
| paged_decode | few query tokens: the context is cut into splits, and their outputs are merged |
| paged_prefill | many query tokens: tiles of queries of a ragged batch, with cached prefixes |
| attention_tile | one tile of keys and values folded into a running softmax, which both share |
| rope_kv_write | rotary embedding, and keys and values into the block-major cache |
| rms_norm | RMSNorm, with the addition of the residual |
| silu_mul | the gate of a SwiGLU feed-forward |
| block_copy | gathers, scatters and moves whole KV blocks |
| xxh3 | the checksum of KV blocks, equal to the host's |
| sampling | draws a token for each row of logits, with the next three |
| sampling_adjust | penalties, biases and masks |
| sampling_draw | temperature, top-k, top-p, min-p, and the draw |
| sampling_logprobs | the logarithms of probabilities that a client asked for |
| tuning | launch configurations by device and shape |
| device | what launchers ask of the device |
"""
