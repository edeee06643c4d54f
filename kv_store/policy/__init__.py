"""Who is evicted from a tier.

policy             the seam; factory: a policy by its name
lru, arc, s3fifo   the yardsticks, over leaf_queue (an order in which a chain goes from its end) and ghosts
tenant_orders      an order of its own for each tenant that may not have more
density            ours: over stretches (what comes back together), reuse_model (how soon, learnt) and ranked_buckets
chains             which held blocks others continue
"""
