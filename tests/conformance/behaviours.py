"""What the cases of cases.json do with a daemon, and what they expect of it.

One function per value of "do"; each raises exchange.Failed where the daemon is wrong. README.md has the form of a case.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exchange import (
    PATIENCE,
    Client,
    Direct,
    Failed,
    Invisible,
    Response,
    ThroughApache,
    bytes_of,
    data_of,
    echo,
    envelope,
    established,
    memfd,
    require,
    tcp_pair,
    visible,
    wait_for,
    wait_until_closed,
)

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
Way = Direct | ThroughApache
Case = dict[str, Any]
# Where one socket takes both forms, this is how they are told apart.
_BEGINS_ENVELOPE = re.compile(rb'\{"handoff":-?[0-9]')


def expand(value: Any) -> Any:
    """The case with its long texts: {"repeat": text, "times": n}."""
    if isinstance(value, dict):
        if set(value) == {"repeat", "times"}:
            return value["repeat"] * value["times"]
        return {name: expand(member) for name, member in value.items()}
    return [expand(member) for member in value] if isinstance(value, list) else value


def check(response: Response, case: Case, form: str) -> None:
    """Whether a response is what the case expects; and what holds for every response."""
    expect = case["expect"]
    require(not response.reset, f"ended with RST after {len(response.raw)} bytes: no lingering close, or a bare close")
    statuses = expect["status"] if isinstance(expect["status"], list) else [expect["status"]]
    require(response.status in statuses, f"status {response.status} instead of {statuses}: {response.raw[:400]!r}")
    for name, pattern in expect.get("headers", {}).items():
        value = response.header(name)
        require(value is not None, f"no {name}")
        require(re.fullmatch(pattern, value or "", re.IGNORECASE), f"{name}: {value!r} instead of {pattern!r}")
    for name in expect.get("without", []):
        require(response.header(name) is None, f"{name}: {response.header(name)}")
    if "cookies" in expect:
        cookies = [value for name, value in response.headers if name == "set-cookie"]
        require(cookies == expect["cookies"], f"cookies {cookies}")
    protocol = case.get("envelope", {}).get("protocol", "HTTP/1.1")
    if form == "plain" or protocol == "HTTP/1.0":
        require(response.header("transfer-encoding") is None, "chunked, to a client that may be of HTTP/1.0")
    if expect.get("empty") or case.get("envelope", {}).get("method") == "HEAD":
        require(response.body == b"", f"a body to HEAD: {response.body[:100]!r}")
        return
    content = response.content
    if response.status != 200:
        require(content, "an error without a body")
        return
    if "done" not in expect:
        return
    events = response.events
    require((events[-1] == "data: [DONE]") == expect["done"], f"the last event is {events[-1]!r}")
    require(events.count("data: [DONE]") == int(expect["done"]), f"[DONE] {events.count('data: [DONE]')} times")
    if expect.get("error_event"):
        name, _, data = events[-1].partition("\n")
        require(name == "event: error" and "error" in json.loads(data.removeprefix("data: ")), events[-1])
    if "pieces" in expect:
        require(response.texts == echo(case["data"]), f"pieces {response.texts} instead of {echo(case['data'])}")
    if "first_pieces" in expect:
        pieces = echo(case["data"])[: expect["first_pieces"]]
        require(response.texts == pieces, f"pieces {response.texts} instead of {pieces}")
    if "text" in expect:
        text, wanted = "".join(response.texts), "".join(echo(case["data"]))
        require(text == wanted, f"{len(text)} characters instead of {len(wanted)}, or others: {text[:60]!r}…")


def ask(way: Way, case: Case, form: str) -> None:
    """Hand a client over, read to the end."""
    for _ in range(case.get("times", 1)):
        check(way.hand(case, form).finish(), case, form)


ORDINARY = {
    "data": {"prompt": "a", "demo": {"tokens": 2, "tokens_per_second": 10000}},
    "expect": {"status": 200, "done": True},
}


def still_serves(way: Way, form: str) -> None:
    case = copy.deepcopy(ORDINARY)
    try:
        check(way.hand(case, form).finish(), case, form)
    except Failed as error:
        raise Failed(f"the client after it: {error}") from None


def inode_of(way: Way, client: Client) -> int:
    inode = way.inode(client) if isinstance(way, ThroughApache) else client.inode
    if inode is None or not visible(inode):
        raise Invisible("the daemon's descriptors are not visible to this user: run as root, or as the daemon's user")
    return inode


def linger(way: Way, case: Case, form: str) -> None:
    """The client has the answer and stays: it must get FIN, and in the end the daemon closes all the same."""
    client = way.hand(case, form)
    client.read_until(b"\r\n\r\n")
    inode = client.inode or 0
    response = client.finish(keep=True)
    require(not response.reset, "ended with RST instead of FIN")
    wait_until_closed("the connection of a client that does not hang up is", inode)
    client.leave()
    still_serves(way, form)


def late(way: Way, case: Case, form: str) -> None:
    """The client reads only when the daemon has ended the connection, and has sent what nobody will read."""
    client = way.hand(case, form)
    wait_for(lambda: not established(client.sock), "the daemon ends the connection (FIN)")
    check(client.finish(), case, form)


def leave(way: Way, case: Case, form: str) -> None:
    """The client goes in the middle: its descriptor is closed, and others are served."""
    client = way.hand(case, form)
    client.read_until(b"\n\n")
    inode = inode_of(way, client)
    client.leave()
    wait_until_closed("the descriptor of a client that has left is", inode)
    still_serves(way, form)


def slow(way: Way, case: Case, form: str) -> None:
    """One client does not read while others are served; then it reads, and gets everything."""
    lazy = way.hand(case, form)
    require(lazy.sock.recv(1, socket.MSG_PEEK), "ended before it began")
    for _ in range(3):
        still_serves(way, form)
    response = lazy.finish()
    check(response, case, form)
    require(len(response.texts) == case["data"]["demo"]["tokens"], f"{len(response.texts)} pieces")


def crowd(way: Way, case: Case, form: str) -> None:
    """So many streams at once, none of which ends by itself: each gets its first event while all others are open."""
    clients: list[Client] = []
    errors: list[Failed] = []

    def one() -> None:
        try:
            client = way.hand(case, form)
            clients.append(client)
            # On a machine with much else to do so many processes take a while to begin.
            client.sock.settimeout(4 * PATIENCE)
            client.read_until(b"data: ")
        except Failed as error:
            errors.append(error)
        except OSError as error:
            errors.append(Failed(f"{error!r}"))

    threads = [threading.Thread(target=one, daemon=True) for _ in range(case["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inodes = [client.inode for client in clients if client.inode]
    for client in clients:
        client.leave()
    if errors:
        raise Failed(f"{len(errors)} of {case['clients']} had no first event; the first: {errors[0]}")
    wait_until_closed("the descriptors of all who have left are", *inodes)
    still_serves(way, form)


def message_of(case: Case, form: str) -> bytes:
    data = data_of(case)
    return data if form == "plain" else envelope(data if "data" in case else None, False, case.get("envelope", {}))


def nobody(way: Way, case: Case, form: str) -> None:
    """A message without a client that could be answered: what came with it is closed, and others are served."""
    assert isinstance(way, Direct)
    ours, theirs = [], []
    for kind in case["descriptors"]:
        if kind == "pipe":
            reading, writing = os.pipe()
            ours.append(reading)
            theirs.append(writing)
        else:
            one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            ours.append(one.detach())
            theirs.append(other.detach())
    inodes = [os.fstat(fd).st_ino for fd in theirs]
    way.send(message_of({"data": {"prompt": "a"}}, form), theirs)
    for fd in theirs:
        os.close(fd)
    still_serves(way, form)
    # Only the daemon can still have them: a pipe's other end is ours and has the same name, so it is closed first.
    for fd in ours:
        os.close(fd)
    wait_until_closed("a descriptor that is no client is", *inodes)


def crowded(way: Way, case: Case, form: str) -> None:
    """A client and more descriptors than a message has: the client is told, and all are closed."""
    assert isinstance(way, Direct)
    ours, theirs = tcp_pair()
    pipe = os.pipe()
    inode = os.fstat(pipe[0]).st_ino
    with theirs:
        way.send(message_of(case, form), [theirs.fileno()] + [pipe[1]] * case["pipes"])
    os.close(pipe[0])
    os.close(pipe[1])
    check(Client(ours).finish(), case, form)
    wait_until_closed("the descriptors that nobody expected are", inode)
    still_serves(way, form)


def silent(way: Way, case: Case, form: str) -> None:
    """Peers that connect and say nothing."""
    assert isinstance(way, Direct)
    peers = [way.connect() for _ in range(5)]
    try:
        check(way.hand(case, form).finish(), case, form)
    finally:
        for peer in peers:
            peer.close()


def _is_good_data(data: bytes) -> bool:
    """Whether the application's data of a vector is what a daemon of JSON takes."""
    text = data.strip(b"\0 \t\r\n")
    try:
        value = json.loads(text.decode()) if text else {}
    except ValueError:
        return False
    return isinstance(value, dict)


def _refused_member(vector: Case) -> str:
    return str(vector["error"]["field"])


def vectors(way: Way, case: Case, form: str) -> None:
    """Every vector of a section: the status that it stands for, descriptors closed. All are handed over at once."""
    assert isinstance(way, Direct)
    kind = case["vectors"][0]
    listed = json.loads((VECTORS / f"{kind}.json").read_text())
    section = case["vectors"][1] if kind == "envelope" else ""
    handed: list[tuple[str, Client, int, int, bool]] = []
    for vector in listed[section] if section else listed:
        name, message = vector["name"], bytes_of(vector["message"])
        if name in case.get("but", {}):
            continue
        if kind == "envelope":
            # One socket for both forms tells them apart by the first bytes.
            if not _BEGINS_ENVELOPE.match(message) or vector["descriptors"] == 0:
                continue
            data = bytes_of(vector["payload"]) if "payload" in vector else b""
            if section == "refused":
                # As long, and data that is taken: what is refused must be so for the payload and not for what is in it.
                data = (b"{}" if len(data) > 1 else b"").ljust(len(data))
            if section != "refused" and "payload" not in vector:
                data = (json.loads(message)["data"] or "").encode()
            status = 400 if section == "refused" or not _is_good_data(data) else 200
            head = section != "refused" and json.loads(message)["method"] == "HEAD"
            count = vector["descriptors"]
        else:
            refused = "error" in vector
            if refused and "members" in case and _refused_member(vector) not in case["members"]:
                continue
            status, head, count, data = (400 if refused else 200), False, 1, b""
        ours, theirs = tcp_pair()
        owned = [memfd(data, vector.get("second", "memfd"))] if count > 1 else []
        if count > 2:
            owned.append(os.dup(owned[0]))
        try:
            with theirs:
                inode = os.fstat(theirs.fileno()).st_ino
                way.send(message, [theirs.fileno(), *owned])
        finally:
            for fd in owned:
                os.close(fd)
        handed.append((name, Client(ours), inode, status, head))
    require(handed, "no vector is left of them")
    wrong = []
    for name, client, _, status, head in handed:
        expect: Case = {"status": status}
        if status == 200 and not head:
            expect["done"] = True
        try:
            check(client.finish(), {"expect": {**expect, "empty": head}}, "envelope" if kind == "envelope" else "plain")
        except Failed as error:
            wrong.append(f"“{name}”: {error}")
    if wrong:
        raise Failed(f"{len(wrong)} of {len(handed)} vectors: " + "; ".join(wrong[:5]))
    wait_until_closed("the descriptors are", *(inode for _, _, inode, _, _ in handed))


DO: dict[str, Callable[[Way, Case, str], None]] = {
    "ask": ask,
    "late": late,
    "linger": linger,
    "leave": leave,
    "slow": slow,
    "crowd": crowd,
    "nobody": nobody,
    "crowded": crowded,
    "silent": silent,
    "vectors": vectors,
}
