"""The smallest model that llama.cpp loads: one layer of random weights, a vocabulary of some words, 300 KB of GGUF.

usage: model.py FILE

It speaks nonsense, always the same at temperature 0, in pieces that real models have too: spaces in front of words,
newlines, quotes, characters of two, three and four bytes. The rows of the output for bytes, control tokens and the end
of the text are zero, so that they are never the likeliest: an answer is as long as max_tokens says, and valid UTF-8.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import array
import random
import struct
import sys
from pathlib import Path

WIDTH, HEADS, CONTEXT, ALIGNMENT = 64, 4, 4096, 32
_WORDS = """
▁the ▁a ▁socket ▁worker ▁stream ▁Apache ▁hands ▁over ▁and ▁is ▁free ▁in ▁one ▁millisecond ▁while ▁daemon ▁writes
▁naïve ▁Größe ▁日本語 ▁🎉 ▁👋 ing ed s 1 2 3 . , ! ? : " ' \\ / { } [ ] < > &
"""
WORDS = [*_WORDS.split(), "\n", "\n\n"]
LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0456789|_-"
CONTROL, NORMAL, UNKNOWN, BYTE = 3, 1, 2, 6
_U32, _I32, _F32, _STRING, _ARRAY = 4, 5, 6, 8, 9


def vocabulary() -> list[tuple[str, int]]:
    """Tokens and their kinds, in the order of their numbers."""
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    octets = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    words = dict.fromkeys([*WORDS, *LETTERS])
    return [*special, *octets, *((word, NORMAL) for word in words)]


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(tokens: list[tuple[str, int]]) -> list[bytes]:
    def integer(key: str, value: int) -> bytes:
        return entry(key, _U32, struct.pack("<I", value))

    def sequence(key: str, kind: int, items: list[bytes]) -> bytes:
        return entry(key, _ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(items))

    return [
        entry("general.architecture", _STRING, text("llama")),
        entry("general.name", _STRING, text("nonsense")),
        integer("general.alignment", ALIGNMENT),
        integer("llama.context_length", CONTEXT),
        integer("llama.embedding_length", WIDTH),
        integer("llama.block_count", 1),
        integer("llama.feed_forward_length", WIDTH),
        integer("llama.attention.head_count", HEADS),
        integer("llama.attention.head_count_kv", HEADS),
        integer("llama.rope.dimension_count", WIDTH // HEADS),
        entry("llama.attention.layer_norm_rms_epsilon", _F32, struct.pack("<f", 1e-5)),
        entry("tokenizer.ggml.model", _STRING, text("llama")),
        sequence("tokenizer.ggml.tokens", _STRING, [text(token) for token, _ in tokens]),
        sequence("tokenizer.ggml.scores", _F32, [struct.pack("<f", -float(number)) for number in range(len(tokens))]),
        sequence("tokenizer.ggml.token_type", _I32, [struct.pack("<i", kind) for _, kind in tokens]),
        integer("tokenizer.ggml.unknown_token_id", 0),
        integer("tokenizer.ggml.bos_token_id", 1),
        integer("tokenizer.ggml.eos_token_id", 2),
    ]


def tensors(tokens: list[tuple[str, int]]) -> list[tuple[str, tuple[int, ...], array.array[float]]]:
    """Names, shapes (the innermost first) and values."""
    numbers = random.Random(20)

    def weights(count: int) -> array.array[float]:
        return array.array("f", (numbers.gauss(0, 0.3) for _ in range(count)))

    ones = array.array("f", [1.0] * WIDTH)
    output = array.array("f")
    for _, kind in tokens:
        output.extend(weights(WIDTH) if kind == NORMAL else array.array("f", [0.0] * WIDTH))
    square = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
    square += [f"blk.0.{name}.weight" for name in ("ffn_gate", "ffn_up", "ffn_down")]
    return [
        ("token_embd.weight", (WIDTH, len(tokens)), weights(WIDTH * len(tokens))),
        ("output_norm.weight", (WIDTH,), ones),
        ("output.weight", (WIDTH, len(tokens)), output),
        ("blk.0.attn_norm.weight", (WIDTH,), ones),
        ("blk.0.ffn_norm.weight", (WIDTH,), ones),
        *((name, (WIDTH, WIDTH), weights(WIDTH * WIDTH)) for name in square),
    ]


def write(path: Path) -> None:
    tokens = vocabulary()
    entries, every = header(tokens), tensors(tokens)
    infos, data = b"", b""
    for name, shape, values in every:
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += values.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(every), len(entries)) + b"".join(entries) + infos
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
