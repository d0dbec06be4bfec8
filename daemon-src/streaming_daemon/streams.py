"""All streams of one worker and what they share: who is open, who waits, who lingers, and whom to ask for room."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from . import board
from . import http_response as http
from .access_log import StreamRecord, log
from .backends.routing import Router
from .board import Slot
from .client import Client
from .config import LimitsConfig, ListenConfig, ResumeConfig, ServerConfig
from .hangup import HangupSet
from .limits import NO_DESCRIPTORS, Admission, Memory
from .listener import Listener
from .replay import Answers
from .roster import Roster
from .session import Session
from .siblings import Passed, Siblings
from .wheel import TimerWheel

# When descriptors are scarce a client has less time to close its end.
_SHORT_LINGER = 0.2


class Observer(Protocol):
    """Wants to hear of every stream that ends: the access log, later also metrics."""

    def finished(self, record: StreamRecord) -> None: ...


class Streams:
    """All streams of one worker and what they share."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: TimerWheel,
        config: ServerConfig,
        router: Router,
        observers: list[Observer],
        *,
        listen: ListenConfig,
        limits: LimitsConfig | None = None,
        resume: ResumeConfig | None = None,
        slot: Slot | None = None,
        roster: Roster | None = None,
        meeting: Path | None = None,
        content: bool = False,
        traced: bool = False,
    ) -> None:
        """``slot`` and ``roster`` are what other processes know of these streams: how many there are now, and their
        names should this one die. ``meeting`` is where it finds its siblings (``siblings``), None where it has none."""
        self.loop = loop
        self.wheel = wheel
        self.config = config
        self.listen = listen
        # Questions are logged.
        self.content = content
        # Somebody wants to know whose span a stream belongs to.
        self.traced = traced
        self.router = router
        self.slot = slot if slot is not None else _private_slot()
        self.roster = roster or Roster()
        self.hangups = HangupSet(loop)
        self.memory = Memory((limits or LimitsConfig()).max_buffered, self.slot)
        self.limit = Admission(limits or LimitsConfig(), config.max_streams, self.memory, self.slot)
        self.answers: Answers | None = None
        self._siblings: Siblings | None = None
        self._side_door: Listener | None = None
        self._observers = observers
        self._sessions: set[Session] = set()
        # Those whose clients do not read.
        self.blocked: set[Client] = set()
        self._lingering: set[http.LingeringClose] = set()
        if resume is not None and resume.buffer:
            self._meet(meeting)
            self.answers = Answers(resume, wheel, self.memory, self.limit, self.relieve, index=self._siblings)

    def __len__(self) -> int:
        return (
            len(self._sessions)
            + len(self._lingering)
            + (len(self.answers) if self.answers is not None else 0)
            + (self._side_door.pending if self._side_door is not None else 0)
        )

    def open(self, client: socket.socket, message: bytes, fds: list[int]) -> None:
        """Answer ``client``, whose descriptor belongs to this object from now on; ``fds`` are the caller's to close."""
        self._open(client, message, fds, passed_on=False)

    def refuse(self, client: socket.socket, message: bytes) -> None:
        """Tell ``client``, whose message lost descriptors on its way, to come back; it belongs to this object."""
        session = Session(self, client)
        self._sessions.add(session)
        session.begin_refused(message, NO_DESCRIPTORS)

    def end_all(self, kind: str, message: str) -> None:
        """Tell every stream still running that it ends here."""
        for session in list(self._sessions):
            session.end_early(kind, message)
        if self.answers is not None:
            self.answers.end_unread()

    def drop_all(self) -> None:
        """Close every client without another word."""
        for session in list(self._sessions):
            session.drop("drained")

    def close(self) -> None:
        if self._side_door is not None:
            self._side_door.stop()
        if self._siblings is not None:
            self._siblings.close()
        self.hangups.close()
        self.router.close()

    # From sessions

    def ended(self, session: Session, record: StreamRecord) -> None:
        self.forget(session)
        for observer in self._observers:
            observer.finished(record)

    def forget(self, session: Session) -> None:
        self._sessions.discard(session)
        self.blocked.discard(session)

    def linger(self, fd: int) -> None:
        timeout = self.config.linger_timeout
        if self.limit.crowded(fd):
            timeout = min(timeout, _SHORT_LINGER)
        closing = http.LingeringClose(self.loop, self.wheel, fd, timeout, self._lingered)
        self._lingering.add(closing)
        self.slot[board.LINGERING] = len(self._lingering)
        closing.start()

    def pass_on(self, key: str, message: bytes, fds: Sequence[int]) -> Passed:
        return self._siblings.pass_on(key, message, fds) if self._siblings is not None else Passed.NOBODY

    def relieve(self) -> None:
        """Make room: who has the most waiting goes first, a client that does not read or one that is away."""
        while self.memory.full:
            session = max(self.blocked, key=lambda each: each.waiting, default=None)
            answer = self.answers.largest() if self.answers is not None else None
            if session is not None and (answer is None or session.waiting >= answer.size):
                session.drop_slow("buffer_full")
            elif answer is not None and answer.size:
                answer.shed()
            else:
                return

    def _open(self, client: socket.socket, message: bytes, fds: list[int], *, passed_on: bool) -> None:
        session = Session(self, client)
        self._sessions.add(session)
        session.begin(message, fds, passed_on=passed_on)

    def _open_passed(self, client: socket.socket, message: bytes, fds: list[int]) -> None:
        """A client that another worker found to be ours."""
        self._open(client, message, fds, passed_on=True)

    def _lingered(self, closing: http.LingeringClose) -> None:
        self._lingering.discard(closing)
        self.slot[board.LINGERING] = len(self._lingering)

    def _meet(self, meeting: Path | None) -> None:
        if meeting is None:
            return
        try:
            self._siblings = Siblings(meeting)
        except OSError as error:
            log.warning("answers can be continued only by the worker that began them: %s", error)
            return
        timeout = self.config.handoff_timeout
        self._side_door = Listener(
            self.loop, self.wheel, self._siblings.sock, timeout, self._open_passed, refuser=self.refuse
        )
        self._side_door.start()


def _private_slot() -> Slot:
    private, number = board.Board.private()
    return private.slot(number)
