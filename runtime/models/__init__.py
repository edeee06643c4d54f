"""From a model's name to files on disk that every role reads alike. No tensor library: numpy and bytes.

resolve          `resolve_model`: built-in name, local folder, GGUF file or hub id -> ModelFiles
model_files      ModelFiles: a Hugging Face folder and what the router and the nodes must know of it
model_digest     `model_digest`: the identity of a model's weights, equal on every machine that holds them
weight_files     which files of a folder hold the weights; safetensors only
json_files       typed reading of a model's JSON files
gguf_file        a GGUF file's header, parsed with every bound checked
gguf_config      its metadata as config.json
gguf_tokenizer   its vocabulary as tokenizer.json
gguf_weights     its tensors as model.safetensors
gguf_folder      the three together: converted once into a cache, however many processes start at once
hub              download from the Hugging Face hub
"""
