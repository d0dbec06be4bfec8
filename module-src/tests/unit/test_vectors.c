/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_envelope.h"
#include "handoff_payload.h"
#include "handoff_wire.h"
#include "tap.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The vectors that every implementation reads: tests/vectors/README.md says what they mean. */

#define MAX_HEADERS 16

typedef struct {
    char *bytes;                  /* and a NUL behind them                                        */
    size_t length;
} text;

static void *enough(size_t size)
{
    void *memory = malloc(size);

    if (memory == NULL) {
        perror("malloc");
        exit(1);
    }
    return memory;
}

static text text_of(const char *bytes, size_t length)
{
    text copy = { enough(length + 1), length };

    memcpy(copy.bytes, bytes, length);
    copy.bytes[length] = '\0';
    return copy;
}

static text from_base64(const char *digits)
{
    static const char alphabet[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    text decoded = text_of(digits, strlen(digits));
    unsigned int bits = 0;
    int count = 0;

    decoded.length = 0;
    for (; *digits != '\0' && *digits != '='; digits++) {
        bits = bits << 6 | (unsigned int)(strchr(alphabet, *digits) - alphabet);
        count += 6;
        if (count >= 8) {
            count -= 8;
            decoded.bytes[decoded.length++] = (char)(bits >> count & 0xff);
        }
    }
    decoded.bytes[decoded.length] = '\0';
    return decoded;
}

/* {"utf8": "before % behind", "pad": n, or "nest": n} */
static text padded(const json_t *value)
{
    const char *pattern = json_string_value(json_object_get(value, "utf8"));
    size_t nest = (size_t)json_integer_value(json_object_get(value, "nest"));
    size_t middle = nest > 0 ? 2 * nest
                             : (size_t)json_integer_value(json_object_get(value, "pad"));
    size_t before = strcspn(pattern, "%");
    size_t behind = strlen(pattern + before + 1);
    text filled = { enough(before + middle + behind + 1), before + middle + behind };
    char *at = filled.bytes + before;

    memcpy(filled.bytes, pattern, before);
    memset(at, nest > 0 ? '[' : 'x', middle);
    memset(at + nest, nest > 0 ? ']' : 'x', nest);
    memcpy(at + middle, pattern + before + 1, behind + 1);
    return filled;
}

static text text_from(const json_t *value)
{
    const json_t *utf8 = value;

    if (json_is_object(value)) {
        const char *base64 = json_string_value(json_object_get(value, "base64"));

        if (base64 != NULL) {
            return from_base64(base64);
        }
        utf8 = json_object_get(value, "utf8");
        if (json_object_get(value, "pad") != NULL || json_object_get(value, "nest") != NULL) {
            return padded(value);
        }
    }
    return text_of(json_string_value(utf8), json_string_length(utf8));
}

/* The texts of one vector, freed together. */
static text texts[64];
static size_t text_count;

static const text *keep(const json_t *value)
{
    if (text_count == sizeof(texts) / sizeof(texts[0])) {
        fprintf(stderr, "a vector with more texts than expected\n");
        exit(1);
    }
    texts[text_count] = text_from(value);
    return &texts[text_count++];
}

static void forget_all(void)
{
    while (text_count > 0) {
        free(texts[--text_count].bytes);
    }
}

static const char *member(const json_t *object, const char *name)
{
    const json_t *value = json_object_get(object, name);

    return value == NULL || json_is_null(value) ? NULL : keep(value)->bytes;
}

static size_t headers_from(const json_t *pairs, handoff_header *headers)
{
    size_t count = json_array_size(pairs);
    size_t i;

    for (i = 0; i < count && i < MAX_HEADERS; i++) {
        headers[i].name = keep(json_array_get(json_array_get(pairs, i), 0))->bytes;
        headers[i].value = keep(json_array_get(json_array_get(pairs, i), 1))->bytes;
    }
    return i;
}

static unsigned int port_of(const json_t *address)
{
    return (unsigned int)json_integer_value(json_object_get(address, "port"));
}

static int payload_comes_back(const text *payload)
{
    char *back = enough(payload->length + 1);
    size_t half = payload->length / 2;
    int fd = handoff_payload_open();
    int same = handoff_payload_append(fd, payload->bytes, half) == 0
               && handoff_payload_append(fd, payload->bytes + half, payload->length - half) == 0
               && handoff_payload_seal(fd) == 0
               && handoff_payload_load(fd, back, payload->length) == 0
               && memcmp(back, payload->bytes, payload->length) == 0;

    close(fd);
    free(back);
    return same;
}

static void envelope_is_written(const json_t *vector)
{
    const char *name = json_string_value(json_object_get(vector, "name"));
    const json_t *from = json_object_get(vector, "envelope");
    const json_t *client = json_object_get(from, "client");
    const json_t *peer = json_object_get(from, "peer");
    const json_t *data = json_object_get(from, "data");
    const text *message = keep(json_object_get(vector, "message"));
    handoff_header headers[MAX_HEADERS];
    handoff_header response_headers[MAX_HEADERS];
    handoff_envelope envelope = {
        .id = member(from, "id"), .method = member(from, "method"), .uri = member(from, "uri"),
        .protocol = member(from, "protocol"), .host = member(from, "host"),
        .client_addr = member(client, "addr"), .client_port = port_of(client),
        .peer_addr = member(peer, "addr"), .peer_port = port_of(peer),
        .scheme = member(from, "scheme"), .target = member(from, "target"),
        .user = member(from, "user"),
        .headers = headers, .response_headers = response_headers,
        .status = (int)json_integer_value(json_object_get(from, "status")),
        .unread_body = json_integer_value(json_object_get(from, "unread_body")),
        .prefetched = (size_t)json_integer_value(json_object_get(from, "prefetched")),
        .has_payload = json_object_get(vector, "payload") != NULL
    };
    size_t room = message->length + 100;
    char *out = enough(room);
    size_t length;

    envelope.header_count = headers_from(json_object_get(from, "headers"), headers);
    envelope.response_header_count = headers_from(json_object_get(from, "response_headers"),
                                                  response_headers);
    if (!json_is_null(data)) {
        const text *kept = keep(data);

        envelope.data = kept->bytes;
        envelope.data_length = kept->length;
    }
    if (envelope.has_payload) {
        const text *payload = keep(json_object_get(vector, "payload"));

        envelope.payload_length = payload->length;
        ok(payload_comes_back(payload), "%s: the payload", name);
    }
    length = handoff_envelope_write(&envelope, out, room);
    if (!ok(length == message->length && memcmp(out, message->bytes, length) == 0, "%s", name)) {
        printf("# %.*s\n# %.2000s\n", (int)(length < room ? length : room), out, message->bytes);
    }
    ok(json_integer_value(json_object_get(vector, "descriptors")) == 1 + envelope.has_payload,
       "%s: the descriptors", name);
    free(out);
}

static void plain_is_the_data_itself(const json_t *vector)
{
    const char *name = json_string_value(json_object_get(vector, "name"));
    const text *data = keep(json_object_get(vector, "message"));
    handoff_wire_message message;

    handoff_wire_plain(&message, data->bytes, data->length, 7);
    ok(message.fd_count == 1 && message.fds[0] == 7
       && (data->length == 0 ? message.length == 1 && *(const char *)message.bytes == '\0'
           : message.length == data->length
             && memcmp(message.bytes, data->bytes, data->length) == 0),
       "plain: %s", name);
}

static json_t *load(const char *path)
{
    json_error_t error;
    json_t *all = json_load_file(path, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES, &error);

    if (all == NULL) {
        fprintf(stderr, "%s:%d: %s\n", path, error.line, error.text);
        exit(1);
    }
    return all;
}

int main(void)
{
    json_t *plain = load("../tests/vectors/plain.json");
    json_t *envelopes = load("../tests/vectors/envelope.json");
    const json_t *sent = json_object_get(envelopes, "sent");
    size_t i;

    for (i = 0; i < json_array_size(plain); i++) {
        plain_is_the_data_itself(json_array_get(plain, i));
        forget_all();
    }
    for (i = 0; i < json_array_size(sent); i++) {
        envelope_is_written(json_array_get(sent, i));
        forget_all();
    }
    ok(json_array_size(plain) >= 52 && json_array_size(sent) >= 39, "no vector was lost");
    json_decref(plain);
    json_decref(envelopes);
    return tap_end();
}
