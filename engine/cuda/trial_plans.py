"""Plans that nobody asked for: what a runner is warmed up with, and what its largest step is measured with. Pure."""

from engine.cuda.limits import BatchLimits
from engine.runner import ScheduledChunk, StepPlan
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams


def prefill_plan(
    layout: KVLayout, vocab_size: int, *, num_seqs: int, tokens_per_seq: int, num_drafts: int = 0
) -> StepPlan:
    """So many prompts of one length, each in blocks of its own, from block 0 on, which all draw."""
    blocks_per_seq = layout.num_blocks_for(tokens_per_seq)
    return StepPlan(
        tuple(
            ScheduledChunk(
                request_id=RequestId(f"trial-{place}"),
                token_ids=[token_id % vocab_size for token_id in range(tokens_per_seq)],
                start=0,
                block_ids=range(place * blocks_per_seq, (place + 1) * blocks_per_seq),
                samples=True,
                output_position=0,
                sampling=SamplingParams(max_tokens=1, seed=place),
                prompt_token_ids=(),
                output_token_ids=(),
                num_drafts=min(num_drafts, tokens_per_seq - 1),
            )
            for place in range(num_seqs)
        )
    )


def largest_plan(layout: KVLayout, vocab_size: int, max_model_len: int, limits: BatchLimits) -> StepPlan:
    """As many tokens and draws as one step can have: activations grow with the former, logits with the latter."""
    num_seqs = limits.max_rows
    tokens_per_seq = min(limits.max_num_batched_tokens // num_seqs, max_model_len)
    return prefill_plan(
        layout, vocab_size, num_seqs=num_seqs, tokens_per_seq=tokens_per_seq, num_drafts=limits.max_drafts
    )


def num_blocks_of(plan: StepPlan) -> int:
    """Blocks that the plan's tables name."""
    return sum(len(chunk.block_ids) for chunk in plan.chunks)
