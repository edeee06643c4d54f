"""The fallback: models of any other family, run by the transformers library's modelling code over our paged KV cache.

attention   how a model's attention calls reach us, and what is refused among them
settings    the library's configuration of a model folder; what cannot work is refused before anything is built
probe       the model's shape as its attention shows it, measured on a model without weights
loading     weights into the library's model, and its linears into packed ones
model       the forward pass over flattened tokens
self_check  a few tokens through our path and the library's own, at load

This package needs the optional `transformers` package; engine.model.choice imports it, or says what to install.
"""
