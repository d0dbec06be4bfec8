# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""How a directory of sources travels to a host: one digest, one parcel.

The controller packs a tree (lookup ``source_tree``), the host unpacks it
(module ``source_tree``). Both sides name a tree by the same digest, which is
taken over paths and bytes only: neither time stamps, nor the order in which a
file system lists its entries, nor compiled leftovers change it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib


def digest_of(files: dict[str, bytes]) -> str:
    """Return the SHA-256 (hex) that names this set of relative paths and contents."""
    total = hashlib.sha256()
    for path in sorted(files):
        content = hashlib.sha256(files[path]).hexdigest()
        total.update(f"{content}  {path}\n".encode())
    return total.hexdigest()


def pack(files: dict[str, bytes]) -> str:
    """Return the tree as one line of text that a module parameter can carry."""
    plain = {path: base64.b64encode(files[path]).decode() for path in sorted(files)}
    return base64.b64encode(zlib.compress(json.dumps(plain).encode(), 9)).decode()


def unpack(parcel: str) -> dict[str, bytes]:
    """Return what pack() was given.

    Raises ValueError when the parcel is damaged or names a path outside the tree.
    """
    try:
        plain = json.loads(zlib.decompress(base64.b64decode(parcel, validate=True)))
        files = {path: base64.b64decode(text, validate=True) for path, text in plain.items()}
    except (ValueError, zlib.error, AttributeError, TypeError) as error:
        raise ValueError(f"the parcel is damaged: {error}") from error
    for path in files:
        parts = path.split("/")
        if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"the parcel names a path outside its tree: {path!r}")
    return files
