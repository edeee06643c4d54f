"""A store that peers can read from: kv_store behind kv_transfer. Alone in a process, or inside a prefill or decode node."""
