"""The step on a device that works while the host goes on. Nothing here is imported on a node that computes on a CPU.

device           Device: streams, completions, pinned memory, capture; and the host's own, which proves the rest
cuda_device      CudaDevice: the same over torch.cuda
limits           BatchLimits: what a step holds at most
runner           CudaRunner: launches steps, two in flight
rows             RowTable: which row of the batch is whose
batch            PersistentBatch: the tensors that captured steps read, and how the host changes them
mixed_step       MixedInputs: a step of prefill chunks and drafts, whose tensors are its own
decode_graphs    DecodeGraphs: captured decode steps by padded size
row_sampler      RowSampler: draws with parameters that stay on the device
outputs          OutputRecords: what was drawn, on its way to the host
device_step      DeviceStep: a launched step, waiting to be collected
offload_stream   OffloadStream: KV blocks to host memory and back, beside the steps
device_blocks    DeviceBlocks: the KV cache, for those who move its blocks between processes
trial_plans      what a runner is warmed up and measured with
memory           how many KV blocks fit: measured, then worked out
build            from a model folder to a CudaRunner
"""
