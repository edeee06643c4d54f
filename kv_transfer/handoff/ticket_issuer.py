"""TicketIssuer: makes the tickets of one owner, in one life of it."""

from dataclasses import dataclass

from protocol.ids import ContextHash, Incarnation, RequestId, WorkerId, new_ticket_id
from protocol.kv_layout import KVLayout
from protocol.transfer import TransferTicket


@dataclass(frozen=True, slots=True)
class TicketIssuer:
    """`control_url` is where holders of a ticket turn to."""

    owner: WorkerId
    incarnation: Incarnation
    layout: KVLayout
    control_url: str

    def issue(self, request_id: RequestId, num_tokens: int, context_hash: ContextHash, ttl_s: float) -> TransferTicket:
        """A new ticket to the KV of `num_tokens` tokens, bound to exactly these by their hash."""
        return TransferTicket(
            ticket_id=new_ticket_id(),
            request_id=request_id,
            owner=self.owner,
            incarnation=self.incarnation,
            layout_fingerprint=self.layout.fingerprint,
            control_url=self.control_url,
            num_tokens=num_tokens,
            context_hash=context_hash,
            ttl_s=ttl_s,
        )
