/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_envelope.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Where the text goes. length counts on after the room has ended, as snprintf(3) does. */
typedef struct {
    char *bytes;
    size_t size;
    size_t length;
} sink;

static void put(sink *out, const char *bytes, size_t length)
{
    if (out->length < out->size) {
        size_t room = out->size - out->length;

        memcpy(out->bytes + out->length, bytes, length < room ? length : room);
    }
    out->length += length;
}

static void put_literal(sink *out, const char *text)
{
    put(out, text, strlen(text));
}

/* RFC 3629, section 4: how many bytes the character at text has, 0 where there is none. What the
 * second byte may be depends on the first: that is how overlong forms, surrogates and everything
 * above U+10FFFF are told. */
static size_t utf8_character(const unsigned char *text, size_t left)
{
    static const struct {
        unsigned char first;      /* the first byte, up to this one                               */
        unsigned char second_min;
        unsigned char second_max;
        unsigned char length;     /* 0: no character begins so                                    */
    } forms[] = {
        { 0x7f, 0x00, 0x00, 1 },
        { 0xc1, 0x00, 0x00, 0 },
        { 0xdf, 0x80, 0xbf, 2 },
        { 0xe0, 0xa0, 0xbf, 3 },
        { 0xec, 0x80, 0xbf, 3 },
        { 0xed, 0x80, 0x9f, 3 },
        { 0xef, 0x80, 0xbf, 3 },
        { 0xf0, 0x90, 0xbf, 4 },
        { 0xf3, 0x80, 0xbf, 4 },
        { 0xf4, 0x80, 0x8f, 4 },
        { 0xff, 0x00, 0x00, 0 },
    };
    size_t form = 0;
    size_t i;

    while (text[0] > forms[form].first) {
        form++;
    }
    if (forms[form].length > left) {
        return 0;
    }
    for (i = 1; i < forms[form].length; i++) {
        unsigned char min = i == 1 ? forms[form].second_min : 0x80;
        unsigned char max = i == 1 ? forms[form].second_max : 0xbf;

        if (text[i] < min || text[i] > max) {
            return 0;
        }
    }
    return forms[form].length;
}

int handoff_is_utf8(const void *bytes, size_t length)
{
    const unsigned char *text = bytes;
    size_t i = 0;

    while (i < length) {
        uint64_t eight;
        size_t n;

        /* Nearly all of it is ASCII: eight bytes at a time. */
        if (length - i >= sizeof(eight)) {
            memcpy(&eight, text + i, sizeof(eight));
            if ((eight & UINT64_C(0x8080808080808080)) == 0) {
                i += sizeof(eight);
                continue;
            }
        }
        n = utf8_character(text + i, length - i);
        if (n == 0) {
            return 0;
        }
        i += n;
    }
    return 1;
}

static void put_escaped(sink *out, unsigned char byte)
{
    static const char shorts[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    char text[8];
    size_t i;

    for (i = 0; i + 1 < sizeof(shorts); i += 2) {
        if (byte == (unsigned char)shorts[i]) {
            text[0] = '\\';
            text[1] = shorts[i + 1];
            put(out, text, 2);
            return;
        }
    }
    if (byte < 0x20) {
        put(out, text, (size_t)snprintf(text, sizeof(text), "\\u%04x", byte));
        return;
    }
    text[0] = (char)(0xc0 | byte >> 6);     /* ISO-8859-1 is the first 256 of Unicode */
    text[1] = (char)(0x80 | (byte & 0x3f));
    put(out, text, 2);
}

#define EACH(byte) (UINT64_C(0x0101010101010101) * (byte))

/* Whether JSON takes these eight bytes as they are. Subtracting borrows into a byte's highest bit
 * exactly where the byte is smaller; a false alarm needs a true one below it. high: the bits that
 * no byte may have. */
static int is_plain(const char *text, uint64_t high)
{
    uint64_t eight;
    uint64_t quote;
    uint64_t backslash;

    memcpy(&eight, text, sizeof(eight));
    quote = eight ^ EACH('"');
    backslash = eight ^ EACH('\\');
    return ((((eight - EACH(0x20)) & ~eight) | ((quote - EACH(1)) & ~quote)
             | ((backslash - EACH(1)) & ~backslash) | (eight & high)) & EACH(0x80)) == 0;
}

static void put_string(sink *out, const char *bytes, size_t length)
{
    unsigned char top = handoff_is_utf8(bytes, length) ? 0xff : 0x7f;
    uint64_t high = top == 0x7f ? EACH(0x80) : 0;
    size_t begin = 0;
    size_t i = 0;

    put(out, "\"", 1);
    while (i < length) {
        size_t stop = length - i > sizeof(uint64_t) ? i + sizeof(uint64_t) : length;

        if (stop - i == sizeof(uint64_t) && is_plain(bytes + i, high)) {
            i = stop;
            continue;
        }
        for (; i < stop; i++) {
            unsigned char byte = (unsigned char)bytes[i];

            if (byte < 0x20 || byte == '"' || byte == '\\' || byte > top) {
                put(out, bytes + begin, i - begin);
                put_escaped(out, byte);
                begin = i + 1;
            }
        }
    }
    put(out, bytes + begin, length - begin);
    put(out, "\"", 1);
}

static void put_text(sink *out, const char *text)
{
    put_string(out, text, strlen(text));
}

/* snprintf(3) costs as much as all the rest of an envelope. */
static void put_unsigned(sink *out, uint64_t number)
{
    char text[20];
    size_t at = sizeof(text);

    do {
        text[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    put(out, text + at, sizeof(text) - at);
}

static void put_number(sink *out, int64_t number)
{
    if (number < 0) {
        put(out, "-", 1);
    }
    put_unsigned(out, number < 0 ? -(uint64_t)number : (uint64_t)number);
}

static void put_address(sink *out, const char *addr, unsigned int port)
{
    put_literal(out, "{\"addr\":");
    put_text(out, addr);
    put_literal(out, ",\"port\":");
    put_unsigned(out, port);
    put_literal(out, "}");
}

static void put_headers(sink *out, const handoff_header *headers, size_t count)
{
    size_t i;

    put_literal(out, "[");
    for (i = 0; i < count; i++) {
        put_literal(out, i == 0 ? "[" : ",[");
        put_text(out, headers[i].name);
        put_literal(out, ",");
        put_text(out, headers[i].value);
        put_literal(out, "]");
    }
    put_literal(out, "]");
}

size_t handoff_envelope_write(const handoff_envelope *envelope, char *out, size_t size)
{
    sink to = { out, size, 0 };

    put_literal(&to, "{\"handoff\":2,\"id\":");
    put_text(&to, envelope->id);
    put_literal(&to, ",\"method\":");
    put_text(&to, envelope->method);
    put_literal(&to, ",\"uri\":");
    put_text(&to, envelope->uri);
    put_literal(&to, ",\"protocol\":");
    put_text(&to, envelope->protocol);
    put_literal(&to, ",\"host\":");
    if (envelope->host != NULL) {
        put_text(&to, envelope->host);
    }
    else {
        put_literal(&to, "null");
    }
    put_literal(&to, ",\"client\":");
    put_address(&to, envelope->client_addr, envelope->client_port);
    put_literal(&to, ",\"peer\":");
    put_address(&to, envelope->peer_addr, envelope->peer_port);
    put_literal(&to, ",\"scheme\":");
    put_text(&to, envelope->scheme);
    put_literal(&to, ",\"target\":");
    put_text(&to, envelope->target);
    if (envelope->user != NULL) {
        put_literal(&to, ",\"user\":");
        put_text(&to, envelope->user);
    }
    put_literal(&to, ",\"headers\":");
    put_headers(&to, envelope->headers, envelope->header_count);
    put_literal(&to, ",\"response_headers\":");
    put_headers(&to, envelope->response_headers, envelope->response_header_count);
    put_literal(&to, ",\"status\":");
    put_number(&to, envelope->status);
    put_literal(&to, ",\"unread_body\":");
    put_number(&to, envelope->unread_body);
    put_literal(&to, ",\"prefetched\":");
    put_unsigned(&to, envelope->prefetched);
    put_literal(&to, ",\"data\":");
    if (envelope->data != NULL && !envelope->has_payload) {
        put_string(&to, envelope->data, envelope->data_length);
    }
    else {
        put_literal(&to, "null");
    }
    if (envelope->has_payload) {
        put_literal(&to, ",\"payload\":{\"memfd\":true,\"length\":");
        put_unsigned(&to, envelope->payload_length);
        put_literal(&to, "}");
    }
    put_literal(&to, "}");
    return to.length;
}
