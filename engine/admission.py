"""What can be said of a request before it waits: whether it could ever run here."""

from engine.request import EngineRequest, Mode
from engine.runner import Runner
from protocol.errors import InvalidParameter, PromptTooLong


def max_sequence_tokens(runner: Runner) -> int:
    """Prompt and output tokens at which a sequence ends here: the model's limit or that of the blocks."""
    return min(runner.max_model_len, runner.num_blocks * runner.layout.block_size)


def check_request(request: EngineRequest, runner: Runner) -> None:
    """Raise PromptTooLong or InvalidParameter for what can never run. Sampling parameters have been validated."""
    if not request.prompt_token_ids:
        raise InvalidParameter("the prompt has no tokens", param="prompt")
    for name, token_ids in (("prompt", request.prompt_token_ids), ("emitted_token_ids", request.emitted_token_ids)):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < runner.vocab_size):
            raise InvalidParameter(f"{name} has a token outside the vocabulary of {runner.vocab_size}", param=name)
    if len(request.emitted_token_ids) >= request.sampling.max_tokens:
        raise InvalidParameter(
            f"all of the {request.sampling.max_tokens} output tokens asked for have been emitted", param="max_tokens"
        )
    _check_import(request, runner.layout.block_size)
    limit = max_sequence_tokens(runner)
    if request.num_context_tokens >= limit:
        raise PromptTooLong(
            f"the context of {request.num_context_tokens} tokens leaves no room for output: "
            f"this node takes {limit} tokens, prompt and output together",
            param="prompt",
        )


def _check_import(request: EngineRequest, block_size: int) -> None:
    """Whole blocks, and at least one token left to compute: its logits are wanted."""
    most = 0 if request.mode is Mode.IMPORT else request.num_context_tokens - 1
    if request.import_tokens % block_size or not 0 <= request.import_tokens <= most:
        raise InvalidParameter(
            f"{request.import_tokens} tokens cannot be imported: whole blocks of {block_size}, {most} tokens at most",
            param="import_tokens",
        )
