"""Models: the Llama family (Llama, of which SmolLM2 is one, Mistral, Qwen2 and Qwen3), and by the fallback every other.

options       what a runner can be told, and the KV layout that follows from it
config        ModelConfig: config.json, validated; everything unsupported is refused by name
rope          rotary embedding: its settings, its canonical text, its cos and sin tables
weights       tensors by name, from safetensors or made up
choice        which of the two runs a model
llama         the forward pass over flattened tokens
step_inputs   one step's plan as tensors
fallback      other families, by the transformers library's modelling code
"""
