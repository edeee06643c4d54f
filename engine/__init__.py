"""Tokens in, tokens out, on one device.

request            what is asked for
events             what is reported
engine             the step loop on its own thread: owns all state, takes commands, reports events
scheduler          one token budget a step: decodes first, then prefill chunks; preemption by recompute
sequence           one request's life inside the engine
block_pool         KV blocks with reference counts and an O(1) LRU free list
prefix_cache       block hash -> block
runner             the seam to the device; torch_runner, simulated_runner
model/             configuration, weights and the forward pass of the Llama family
sampler            logits -> tokens for the whole batch at once
"""
