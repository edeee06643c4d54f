"""What a process needs to run, whatever its role. Never imports a tensor library.

clock          injected time and deadlines
config         one frozen configuration per process: TOML file, then flags
logs           one line per event, with request ids
metrics        every metric of every role, declared once
life           starting -> ready -> draining -> stopped, signals, /health and /ready
auth           the cluster key that guards the control plane
http_protocol  how long a request's head may be
rpc_server     HTTP edge: decode one message, encode one reply, typed errors
rpc_client     the other end of it
token_outbox   node side of the token stream: one frame per engine step and router
registration   node side of membership: register, heartbeat, leave
child_python   how to start another Python process that imports what this one does
models/        from a model's name to files on disk
"""
