/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_ENVELOPE_H
#define HANDOFF_ENVELOPE_H

/*
 * Writes the envelope: the JSON object (RFC 8259) that tells a daemon what was asked, by whom, and
 * what the application said. docs/wire-protocol.md is the contract, tests/vectors/envelope.json
 * its examples, byte for byte.
 *
 * Rules of this room: plain libc, no httpd or APR type, no logging, no allocation; nothing here
 * keeps a pointer. The output is always valid UTF-8 and valid JSON, whatever bytes a client sent:
 * a text that is not valid UTF-8 (RFC 3629) is taken for ISO-8859-1, byte by byte.
 */

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name;
    const char *value;
} handoff_header;

/* Strings are NUL-terminated and never NULL, but for those that say so. */
typedef struct {
    const char *id;               /* the request's, as in the access log                          */
    const char *method;
    const char *uri;              /* as the client sent it: path and query                        */
    const char *protocol;         /* "HTTP/1.1", "HTTP/1.0"                                       */
    const char *host;             /* that the client named, without the port; NULL: null          */
    const char *client_addr;      /* the true client, behind trusted proxies                      */
    unsigned int client_port;     /* 0: unknown                                                   */
    const char *peer_addr;        /* the other end of the TCP connection                          */
    unsigned int peer_port;
    const char *scheme;
    const char *target;           /* its name, or the path that the application named             */
    const char *user;             /* NULL: the member is left out                                 */
    const handoff_header *headers;
    size_t header_count;
    const handoff_header *response_headers;
    size_t response_header_count;
    int status;                   /* that the application set                                     */
    int64_t unread_body;          /* bytes announced and not sent yet; -1: announced, unknown     */
    size_t prefetched;            /* bytes behind the request that Apache already read            */
    const char *data;             /* valid UTF-8 of data_length bytes; NULL: null                 */
    size_t data_length;
    int has_payload;              /* the data is in the second descriptor                         */
    uint64_t payload_length;
} handoff_envelope;

/* Like snprintf(3), but without a NUL at the end: writes at most size bytes to out and returns how
 * many there are. The result is usable when that is not more than size. */
size_t handoff_envelope_write(const handoff_envelope *envelope, char *out, size_t size);

/* Whether these bytes are valid UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF. */
int handoff_is_utf8(const void *bytes, size_t length);

#endif
