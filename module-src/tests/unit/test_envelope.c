/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_envelope.h"
#include "tap.h"

#include <stdlib.h>
#include <string.h>

/* What whole messages look like is in tests/vectors/envelope.json (test_vectors.c); here are the
 * rules of one string, of the room for the text, and of what is UTF-8. */

static handoff_envelope smallest(void)
{
    handoff_envelope envelope = {
        .id = "1", .method = "GET", .uri = "/", .protocol = "HTTP/1.1", .client_addr = "192.0.2.1",
        .peer_addr = "192.0.2.1", .scheme = "http", .target = "llm", .status = 200
    };

    return envelope;
}

#define SMALLEST_TO_DATA \
    "{\"handoff\":2,\"id\":\"1\",\"method\":\"GET\",\"uri\":\"/\",\"protocol\":\"HTTP/1.1\"," \
    "\"host\":null,\"client\":{\"addr\":\"192.0.2.1\",\"port\":0}," \
    "\"peer\":{\"addr\":\"192.0.2.1\",\"port\":0},\"scheme\":\"http\",\"target\":\"llm\"," \
    "\"headers\":[],\"response_headers\":[],\"status\":200,\"unread_body\":0,\"prefetched\":0," \
    "\"data\":"

static void utf8_is_told_from_what_only_looks_like_it(void)
{
    static const struct {
        const char *name;
        const char *bytes;
        size_t length;
        int is_utf8;
    } cases[] = {
        { "nothing", "", 0, 1 },
        { "ASCII, more than eight bytes", "0123456789", 10, 1 },
        { "NUL", "\0", 1, 1 },
        { "U+007F", "\x7f", 1, 1 },
        { "U+0080, the first of two bytes", "\xc2\x80", 2, 1 },
        { "U+07FF, the last of two bytes", "\xdf\xbf", 2, 1 },
        { "U+0800, the first of three bytes", "\xe0\xa0\x80", 3, 1 },
        { "U+D7FF, before the surrogates", "\xed\x9f\xbf", 3, 1 },
        { "U+E000, behind the surrogates", "\xee\x80\x80", 3, 1 },
        { "U+FFFF, the last of three bytes", "\xef\xbf\xbf", 3, 1 },
        { "U+10000, the first of four bytes", "\xf0\x90\x80\x80", 4, 1 },
        { "U+FFFFF", "\xf3\xbf\xbf\xbf", 4, 1 },
        { "U+10FFFF, the last", "\xf4\x8f\xbf\xbf", 4, 1 },
        { "a character across the eighth byte", "1234567\xc3\xa9zzzzzzzz", 17, 1 },
        { "a lone continuation", "\x80", 1, 0 },
        { "the last continuation", "\xbf", 1, 0 },
        { "overlong NUL", "\xc0\x80", 2, 0 },
        { "overlong U+007F", "\xc1\xbf", 2, 0 },
        { "overlong U+07FF", "\xe0\x9f\xbf", 3, 0 },
        { "overlong U+FFFF", "\xf0\x8f\xbf\xbf", 4, 0 },
        { "a surrogate, the first", "\xed\xa0\x80", 3, 0 },
        { "a surrogate, the last", "\xed\xbf\xbf", 3, 0 },
        { "U+110000", "\xf4\x90\x80\x80", 4, 0 },
        { "five bytes", "\xf8\x88\x80\x80\x80", 5, 0 },
        { "0xfe", "\xfe", 1, 0 },
        { "0xff", "\xff", 1, 0 },
        { "two bytes, cut", "\xc3", 1, 0 },
        { "three bytes, cut", "\xe2\x82", 2, 0 },
        { "four bytes, cut", "\xf0\x9f\x98", 3, 0 },
        { "a second byte that is none", "\xc3(", 2, 0 },
        { "a third byte that is none", "\xe2\x82(", 3, 0 },
        { "a fourth byte that is none", "\xf0\x9f\x98(", 4, 0 },
        { "a bad byte behind eight good ones", "12345678\xff", 9, 0 },
        { "a bad byte among eight", "1234\xff""678", 8, 0 },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        /* In memory of its own, so that one byte too far is seen. */
        char *copy = malloc(cases[i].length + (cases[i].length == 0));

        memcpy(copy, cases[i].bytes, cases[i].length);
        ok(handoff_is_utf8(copy, cases[i].length) == cases[i].is_utf8, "%s: %s", cases[i].name,
           cases[i].is_utf8 ? "UTF-8" : "not UTF-8");
        free(copy);
    }
}

static void every_string_becomes_valid_json(void)
{
    static const struct {
        const char *name;
        const char *bytes;
        size_t length;
        const char *json;
    } cases[] = {
        { "nothing", "", 0, "\"\"" },
        { "quote and backslash", "a\"b\\c", 5, "\"a\\\"b\\\\c\"" },
        { "a slash stays", "</script>", 9, "\"</script>\"" },
        { "the short escapes", "\b\f\n\r\t", 5, "\"\\b\\f\\n\\r\\t\"" },
        { "the other control bytes", "\0\x01\x0b\x1f", 4, "\"\\u0000\\u0001\\u000b\\u001f\"" },
        { "0x7f stays", "\x7f", 1, "\"\x7f\"" },
        { "UTF-8 stays", "\xe6\x97\xa5 \xf0\x9f\x98\x80", 8, "\"\xe6\x97\xa5 \xf0\x9f\x98\x80\"" },
        { "Latin-1", "caf\xe9", 4, "\"caf\xc3\xa9\"" },
        { "one bad byte makes all of it Latin-1", "\xc3\xa9\xff", 3,
          "\"\xc3\x83\xc2\xa9\xc3\xbf\"" },
        { "Latin-1's upper control bytes", "\x80\x9f", 2, "\"\xc2\x80\xc2\x9f\"" },
        { "escapes between Latin-1", "\xff\"\n\xff", 4, "\"\xc3\xbf\\\"\\n\xc3\xbf\"" },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        handoff_envelope envelope = smallest();
        char expected[512];
        char out[512];
        size_t length;

        envelope.data = cases[i].bytes;
        envelope.data_length = cases[i].length;
        snprintf(expected, sizeof(expected), "%s%s}", SMALLEST_TO_DATA, cases[i].json);
        length = handoff_envelope_write(&envelope, out, sizeof(out));
        if (!ok(length == strlen(expected) && memcmp(out, expected, length) == 0, "%s",
                cases[i].name)) {
            printf("# %.*s\n# %s\n", (int)length, out, expected);
        }
    }
}

static void any_bytes_become_valid_utf8_without_control_bytes(void)
{
    unsigned int seed = 1;
    int bad = 0;
    int round;

    for (round = 0; round < 20000; round++) {
        handoff_envelope envelope = smallest();
        char bytes[24];
        char out[1024];
        size_t length;
        size_t i;

        for (i = 0; i < sizeof(bytes); i++) {
            /* Half of them from the bytes that matter most. */
            static const char odd[] = "\"\\\xc0\xc2\xe0\xed\xf0\xf4\x80\xa0\xbf\x90\n\x1f\x7f";

            seed = seed * 1103515245u + 12345u;
            bytes[i] = (seed >> 16) & 1 ? (char)(seed >> 17)
                       : odd[(seed >> 17) % (sizeof(odd) - 1)];
        }
        envelope.data = bytes;
        envelope.data_length = sizeof(bytes);
        length = handoff_envelope_write(&envelope, out, sizeof(out));
        bad += length > sizeof(out) || !handoff_is_utf8(out, length);
        for (i = 0; i < length && i < sizeof(out); i++) {
            bad += (unsigned char)out[i] < 0x20;
        }
    }
    ok(bad == 0, "20000 random strings: the message is UTF-8 and has no control byte");
}

static void the_room_is_kept(void)
{
    static const handoff_header headers[] = { { "A", "\"1\"" }, { "B", "\xff" } };
    handoff_envelope envelope = smallest();
    char whole[1024];
    size_t length;
    size_t size;
    int bad = 0;

    envelope.headers = headers;
    envelope.header_count = 2;
    envelope.user = "al\n";
    envelope.data = "x\ty";
    envelope.data_length = 3;
    length = handoff_envelope_write(&envelope, whole, sizeof(whole));
    ok(length == handoff_envelope_write(&envelope, NULL, 0), "without room the length is the same");
    for (size = 0; size <= length; size++) {
        char *out = malloc(size + (size == 0));     /* one byte too far is seen */

        bad += handoff_envelope_write(&envelope, out, size) != length;
        bad += memcmp(out, whole, size) != 0;
        free(out);
    }
    ok(bad == 0, "with any room from 0 to all of it: its beginning, and never a byte more");
}

static void numbers_are_written_in_full(void)
{
    handoff_envelope envelope = smallest();
    char out[1024];

    envelope.unread_body = INT64_MIN;
    envelope.prefetched = SIZE_MAX;
    envelope.client_port = 65535;
    envelope.has_payload = 1;
    envelope.payload_length = UINT64_MAX;
    envelope.data = "not this one";
    envelope.data_length = 12;
    out[handoff_envelope_write(&envelope, out, sizeof(out) - 1)] = '\0';
    ok(strstr(out, "\"port\":65535}") != NULL
       && strstr(out, "\"unread_body\":-9223372036854775808,") != NULL
       && strstr(out, "\"payload\":{\"memfd\":true,\"length\":18446744073709551615}}") != NULL,
       "the largest numbers keep all their digits");
    ok(strstr(out, "\"data\":null,") != NULL && strstr(out, "not this one") == NULL,
       "with a payload the data is null");
}

int main(void)
{
    utf8_is_told_from_what_only_looks_like_it();
    every_string_becomes_valid_json();
    any_bytes_become_valid_utf8_without_control_bytes();
    the_room_is_kept();
    numbers_are_written_in_full();
    return tap_end();
}
