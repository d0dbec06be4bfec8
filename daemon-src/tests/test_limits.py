"""Limits without sockets: places, tokens, addresses, descriptors."""

from __future__ import annotations

import resource

import pytest

from streaming_daemon.board import BUFFERED, PEAK, Board, Slot
from streaming_daemon.config import LimitsConfig
from streaming_daemon.limits import Admission, Memory, Refusal, TokenBuckets, address_key, without_port


@pytest.fixture
def slot() -> Slot:
    board, number = Board.private()
    return board.slot(number)


def admission(slot: Slot, most: int = 100, **config: float) -> Admission:
    settings = LimitsConfig(**config)  # type: ignore[arg-type]
    return Admission(settings, most, Memory(settings.max_buffered, slot), slot)


def refusal(answer: object) -> str:
    return answer.limit if isinstance(answer, Refusal) else ""


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2::7", "20010db800010002/64".lstrip("0")),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "20010db800010002/64"),
        ("2001:db8:1:3::7", "20010db800010003/64"),
        ("fe80::1%eth0", "fe80000000000000/64"),
        ("unix", ""),
        ("", ""),
        ("::nonsense::", "::nonsense::"),
    ],
)
def test_an_address_counts_as_what_one_subscriber_has(address: str, key: str) -> None:
    assert address_key(address) == key


def test_a_bucket_gives_its_burst_then_its_rate(slot: Slot) -> None:
    buckets = TokenBuckets(2.0, 3)
    assert [buckets.take("ada", 10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("ada", 10.25) == pytest.approx(0.25)
    assert buckets.take("ada", 10.5) == 0
    assert buckets.take("ada", 10.5) == pytest.approx(0.5)
    assert [buckets.take("ada", 1000.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("eve", 10.0) == 0


def test_buckets_are_forgotten_in_the_order_of_use() -> None:
    buckets = TokenBuckets(0.001, 1, most=2)
    for user in ("a", "b", "a", "c"):
        buckets.take(user, 0.0)
    assert len(buckets) == 2
    assert buckets.take("a", 0.0) > 0  # remembered, because it was used after b
    assert buckets.take("b", 0.0) == 0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing_away() -> None:
    buckets = TokenBuckets(1.0, 1)
    assert buckets.take("a", 10.0) == 0
    assert buckets.take("a", 5.0) > 0


def test_a_place_is_given_back_to_user_and_address(slot: Slot) -> None:
    gate = admission(slot, streams_per_user=2, streams_per_address=3)
    assert [refusal(gate.admit("ada", address, 5, 0)) for address in ("a", "b")] == ["", ""]
    assert refusal(gate.admit("ada", "c", 5, 0)) == "user"
    assert gate.active == 2
    gate.free("ada", "a")
    assert refusal(gate.admit("ada", "a", 5, 0)) == ""
    for user in ("x", "y"):
        assert refusal(gate.admit(user, "a", 5, 0)) == ""
    assert refusal(gate.admit("z", "a", 5, 0)) == "address"
    assert slot[PEAK] == 4


def test_nobody_in_particular_has_no_personal_limit(slot: Slot) -> None:
    gate = admission(slot, streams_per_user=1, streams_per_address=1, user_rate=0.001, user_burst=1)
    assert [refusal(gate.admit("", "", 5, 0)) for _ in range(3)] == ["", "", ""]


def test_users_and_addresses_that_are_gone_are_not_remembered(slot: Slot) -> None:
    gate = admission(slot, streams_per_user=5, streams_per_address=5)
    for number in range(1000):
        gate.admit(f"u{number}", f"a{number}", 5, 0)
        gate.free(f"u{number}", f"a{number}")
    assert (gate._users, gate._addresses, gate.active) == ({}, {}, 0)


def test_a_refused_stream_uses_up_no_token(slot: Slot) -> None:
    gate = admission(slot, 1, user_rate=0.001, user_burst=1)
    gate.admit("", "", 5, 0)
    assert refusal(gate.admit("ada", "", 5, 0)) == "streams"
    gate.free("", "")
    assert refusal(gate.admit("ada", "", 5, 0)) == ""


def test_who_asks_too_often_is_told_when_to_come_back(slot: Slot) -> None:
    gate = admission(slot, user_rate=0.1, user_burst=1)
    gate.admit("ada", "", 5, 0)
    answer = gate.admit("ada", "", 5, 3)
    assert isinstance(answer, Refusal)
    assert (answer.limit, answer.status, answer.retry_after) == ("rate", 429, 7)


def test_full_memory_admits_nobody(slot: Slot) -> None:
    gate = admission(slot, max_buffered=1000)
    slot[BUFFERED] = 999
    assert refusal(gate.admit("", "", 5, 0)) == ""
    slot[BUFFERED] = 1000
    assert refusal(gate.admit("", "", 5, 0)) == "memory"


@pytest.mark.parametrize(("limit", "ceiling"), [(1024, 960), (63, 42), (resource.RLIM_INFINITY, (1 << 30) - 64)])
def test_some_descriptors_are_reserved_for_those_who_get_none(
    slot: Slot, monkeypatch: pytest.MonkeyPatch, limit: int, ceiling: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    gate = admission(slot)
    assert refusal(gate.admit("", "", ceiling - 1, 0)) == ""
    assert refusal(gate.admit("", "", ceiling, 0)) == "descriptors"


@pytest.mark.parametrize(
    ("client", "address"),
    [
        ("192.0.2.1:51000", "192.0.2.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:db8::1]:51000", "2001:db8::1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6"),
        ("unix", "unix"),
        ("", ""),
    ],
)
def test_the_address_is_found_with_and_without_a_port(client: str, address: str) -> None:
    assert without_port(client) == address
