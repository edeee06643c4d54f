"""Text in, text out: the only part of the cluster that knows about text. Never imports a tensor library.

A map of the package, from the client inwards:

    main                 the process: two servers on one event loop, drain, exit
    config               what it can be told
    services             what every public route works with
    app, control_app     the public and the internal routes
    http_edge            bodies, limits, keys, request ids, typed errors: what every public route shares
    generation_endpoint  one POST, from its bytes to its answer
    progress             what its log line and metrics say about it
    api_errors           the error tree as OpenAI's error bodies
    api_types            what clients send, decoded and checked once
    api_choices          how often, and with which sampling, each prompt is to be run
    api_responses        what clients get back
    prompts              messages or text -> prompt token ids
    chat_template        messages -> text, in a sandbox
    tokenizer            text -> token ids, bytes of tokens
    detokenizer          tokens -> text, never half a character
    stop_strings         finds them across chunk borders
    text_choice          one sequence's tokens -> text deltas
    generation           one client request: its sequences, their deltas, back-pressure
    openai_chat, openai_completions     the two endpoints
    openai_format, logprobs             what both write alike
    sse                  how answers stream
    admission            how many prompt tokens may wait
    dispatch             the life of one sequence, and its recovery
    attempt              one try at it, on one or two nodes
    merge                both nodes' tokens -> one sequence without gaps
    ledger               where its time went
    cluster              the nodes this router talks to: registry, links, index and load as one
    workers              who is registered
    cache_admin          what operators ask all nodes' caches, or tell them
    prefix_index         which node holds which KV blocks
    in_flight            what this router has sent and not yet seen finished
    policy               which nodes a prompt goes to: a pure function
    node_link            one token stream and the control calls to one node
"""
