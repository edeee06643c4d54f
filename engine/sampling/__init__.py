"""Logits to tokens, for all rows of a step at once.

sampler        Sampler: the order of things, and the state kept for sequences with penalties
parameters     RowParameters: the rows' SamplingParams as tensors, made again only when the batch changes
token_counts   which tokens a sequence has seen, how often it has emitted them
adjust         logit bias, minimum length and penalties
kernels.draw   temperature, top-k, top-p, min-p, and one token by inverting the distribution
randomness     one uniform number for each (seed, output position)
"""
