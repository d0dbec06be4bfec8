/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* An envelope made of whatever bytes come: numbers first, then lines. The result is one JSON
 * object (RFC 8259) in UTF-8 (RFC 3629), and never longer than was said. The two checkers here
 * share nothing with the writer. */

#include "fuzz.h"

#include "handoff_envelope.h"

#include <ctype.h>

#define MAX_HEADERS 8

/* Decodes, encodes again, compares: overlong forms, surrogates and the rest all fall out. */
static int is_utf8(const unsigned char *bytes, size_t length)
{
    size_t i = 0;

    while (i < length) {
        unsigned char again[4];
        uint32_t point;
        size_t count = bytes[i] < 0x80 ? 1 : bytes[i] < 0xe0 ? 2 : bytes[i] < 0xf0 ? 3 : 4;
        size_t k;

        if (count > length - i) {
            return 0;
        }
        point = count == 1 ? bytes[i] : bytes[i] & (0xffu >> (count + 1));
        for (k = 1; k < count; k++) {
            point = point << 6 | (bytes[i + k] & 0x3fu);
        }
        if (point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) {
            return 0;
        }
        if (point < 0x80) {
            again[0] = (unsigned char)point;
            k = 1;
        }
        else {
            k = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
            again[0] = (unsigned char)(0xf00u >> k | point >> (6 * (k - 1)));
            for (size_t n = 1; n < k; n++) {
                again[n] = (unsigned char)(0x80u | (point >> (6 * (k - 1 - n)) & 0x3fu));
            }
        }
        if (k != count || memcmp(again, bytes + i, count) != 0) {
            return 0;
        }
        i += count;
    }
    return 1;
}

/* --- JSON: each takes one thing off the text or aborts ---------------------------------------- */

typedef struct {
    const unsigned char *at;
    const unsigned char *end;
} json;

static int take(json *text, char wanted)
{
    if (text->at < text->end && *text->at == (unsigned char)wanted) {
        text->at++;
        return 1;
    }
    return 0;
}

static void take_word(json *text, const char *word)
{
    for (; *word != '\0'; word++) {
        PROMISE(take(text, *word));
    }
}

static void take_string(json *text)
{
    PROMISE(take(text, '"'));
    while (!take(text, '"')) {
        PROMISE(text->at < text->end && *text->at >= 0x20);
        if (take(text, '\\')) {
            PROMISE(text->at < text->end && strchr("\"\\bfnrtu", *text->at) != NULL);
            if (*text->at++ == 'u') {
                int i;

                for (i = 0; i < 4; i++, text->at++) {
                    PROMISE(text->at < text->end && isxdigit(*text->at));
                }
            }
        }
        else {
            text->at++;
        }
    }
}

static void take_number(json *text)
{
    (void)take(text, '-');
    PROMISE(text->at < text->end && isdigit(*text->at));
    if (!take(text, '0')) {
        while (text->at < text->end && isdigit(*text->at)) {
            text->at++;
        }
    }
}

static void take_value(json *text, int depth)
{
    PROMISE(depth < 4);
    PROMISE(text->at < text->end);
    switch (*text->at) {
    case '"':
        take_string(text);
        break;
    case '{':
    case '[':
    {
        int is_object = *text->at == '{';
        char close = is_object ? '}' : ']';

        text->at++;
        if (take(text, close)) {
            break;
        }
        do {
            if (is_object) {
                take_string(text);
                PROMISE(take(text, ':'));
            }
            take_value(text, depth + 1);
        } while (take(text, ','));
        PROMISE(take(text, close));
        break;
    }
    case 'n':
        take_word(text, "null");
        break;
    case 't':
        take_word(text, "true");
        break;
    default:
        take_number(text);
    }
}

/* ------------------------------------------------------------------------------------------------ */

static uint64_t take_long(fuzz_input *in)
{
    uint64_t value = 0;
    int i;

    for (i = 0; i < 8; i++) {
        value = value << 8 | take_byte(in);
    }
    return value;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    handoff_header headers[MAX_HEADERS];
    handoff_envelope envelope;
    char *lines[9 + 2 * MAX_HEADERS];
    unsigned int flags = take_byte(&in);
    size_t split = take_byte(&in) % (MAX_HEADERS + 1);
    size_t length;
    size_t room;
    size_t i;
    char *rest;
    char *beginning;
    char *out;
    json text;

    PROMISE(handoff_is_utf8(data, size) == is_utf8(data, size));

    memset(&envelope, 0, sizeof(envelope));
    envelope.client_port = take_byte(&in) << 8 | take_byte(&in);
    envelope.peer_port = take_byte(&in) << 8 | take_byte(&in);
    envelope.status = (int)(take_byte(&in) << 8 | take_byte(&in));
    envelope.unread_body = (int64_t)(take_long(&in) >> 1) - 1;
    envelope.prefetched = (size_t)take_long(&in);
    envelope.payload_length = take_long(&in);
    envelope.has_payload = flags & 1;
    for (i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        lines[i] = take_line(&in);
    }
    envelope.id = lines[0];
    envelope.method = lines[1];
    envelope.uri = lines[2];
    envelope.protocol = lines[3];
    envelope.host = flags & 2 ? NULL : lines[4];
    envelope.client_addr = lines[5];
    envelope.peer_addr = lines[6];
    envelope.scheme = flags & 4 ? "http" : "https";
    envelope.target = lines[7];
    envelope.user = flags & 8 ? NULL : lines[8];
    for (i = 0; i < MAX_HEADERS; i++) {
        headers[i].name = lines[9 + 2 * i];
        headers[i].value = lines[10 + 2 * i];
    }
    envelope.headers = headers;
    envelope.header_count = split;
    envelope.response_headers = headers + split;
    envelope.response_header_count = MAX_HEADERS - split;
    length = in.size;
    rest = take_bytes(&in, length);
    if (!envelope.has_payload && is_utf8((unsigned char *)rest, length) && !(flags & 16)) {
        envelope.data = rest;
        envelope.data_length = length;
    }

    length = handoff_envelope_write(&envelope, NULL, 0);
    PROMISE(length > 100);
    out = malloc(length);
    PROMISE(out != NULL);
    PROMISE(handoff_envelope_write(&envelope, out, length) == length);
    PROMISE(is_utf8((unsigned char *)out, length));
    PROMISE(memcmp(out, "{\"handoff\":2,", 13) == 0);
    text.at = (unsigned char *)out;
    text.end = text.at + length;
    take_value(&text, 0);
    PROMISE(text.at == text.end);

    /* Too little room: the same beginning, and not a byte beyond it (ASan looks). */
    room = (flags >> 5) * length / 8;
    beginning = malloc(room > 0 ? room : 1);
    PROMISE(beginning != NULL);
    PROMISE(handoff_envelope_write(&envelope, beginning, room) == length);
    PROMISE(memcmp(beginning, out, room) == 0);
    free(beginning);
    free(out);
    free(rest);
    for (i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        free(lines[i]);
    }
    return 0;
}
