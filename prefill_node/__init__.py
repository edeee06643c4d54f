"""The prefill node: computes prompts, samples their first token, exports their KV blocks under leases.

main       the process: from configuration to exit
service    requests and engine events, turned into exports and token messages
"""
