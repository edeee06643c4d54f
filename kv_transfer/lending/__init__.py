"""Prefixes that one node computed and another needs: a chat's next turn, a shared system prompt.

lender            the owner's side: pins what it holds and leases it
holders           who is said to hold how much of a context
borrowing         brings the beginning of one context from one or more holders; borrow_choice knows when that is worth it
prefix_imports    requests that wait for their first blocks
gathering         a whole context from the node that computes it and from other holders
"""
