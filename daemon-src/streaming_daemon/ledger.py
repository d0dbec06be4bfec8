"""Enters every ended stream into the board: once, whatever became of it.

What happens while a stream runs is counted where it happens, with a word of the slot and nothing more; see board.
"""

from __future__ import annotations

from . import board
from .access_log import StreamRecord
from .board import Slot, observe

# Why a stream is an error, in the words of the dashboards that exist; what is missing here is none.
_REASONS = {
    "client_gone": "client_disconnected",
    "write_timeout": "slow_client",
    "buffer_full": "slow_client",
    "timeout": "timeout",
    "backend_error": "backend",
    "drained": "canceled",
}
# "resumed": the client has another connection for the same answer.
_NOT_COUNTED = ("done", "bad_request", "overloaded", "resumed")


class Ledger:
    """Observer of one worker's streams."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def finished(self, record: StreamRecord) -> None:
        slot = self._slot
        outcome = record.outcome
        slot[board.STREAMS.get(outcome, board.STREAMS["other"])] += 1
        observe(slot, board.STREAM_DURATION, record.duration)
        if record.first_event is not None:
            observe(slot, board.FIRST_EVENT, record.first_event)
        if outcome not in _NOT_COUNTED:
            reason = _REASONS.get(outcome, "other")
            slot[board.STREAM_ERRORS[reason]] += 1
            if reason == "slow_client":
                slot[board.SLOW_CLIENTS] += 1
        if record.limit:
            slot[board.REJECTED] += 1
            slot[board.LIMITED.get(record.limit, board.LIMITED["other"])] += 1
        if record.replay:
            slot[board.REPLAYS] += 1
        if record.tries > 1:
            slot[board.RETRIES] += record.tries - 1
