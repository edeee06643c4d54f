"""Who is evicted from a tier. `policy` is the seam; every other module is one answer."""
