"""Tokens in, tokens out, on one device.

request            what is asked for
events             what is reported
engine             the step loop on its own thread: owns all state, takes commands, reports events
core               the same without the thread: commands and steps in, events out
scheduler          one token budget a step: decodes first, then prefill chunks; preemption by recompute
speculation        guesses of what follows, and whether they were right
step_pipeline      steps in flight, from launch to result; step_times: where their time went; prefill_rate: how fast prompts go
outcomes           what a step meant to each sequence; with stop_rules and timing
sequence           one request's life inside the engine; waiting_queue: before it is admitted
block_tables       which blocks hold which sequence, over block_pool and prefix_cache
block_pool         KV blocks with reference counts and an O(1) LRU free list; free_runs: those that hold nothing
prefix_cache       block hash -> block; kv_event_log: what it gained and lost, for the routers
offloading         what the store behind the prefix cache is offered, and may bring; backing: the seam to that store
admission, config, load
                   what is taken on, what is allowed, how much is going on
runner             the seam to the device; torch_runner, simulated_runner, and cuda/ for GPUs
build              from a node's configuration to an engine; telemetry: what it tells others
model/             configuration, weights and the forward pass of the Llama family, and of others by the transformers library
sampling/          logits -> tokens for the whole batch at once
"""
