/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_PAYLOAD_H
#define HANDOFF_PAYLOAD_H

/*
 * Data for a daemon in a memfd (memfd_create(2)): collected piece by piece, without holding it in
 * the request's pool, and at the end sealed, so that a daemon may map it and trust its size.
 *
 * Rules of this room: plain libc, no httpd or APR type, no logging. Functions return 0 or an errno,
 * but for open. The caller closes the descriptor.
 */

#include <stddef.h>

/* A new, empty memfd with close-on-exec; -1 with errno. */
int handoff_payload_open(void);

/* Appends all of the bytes, or says why not. */
int handoff_payload_append(int fd, const void *bytes, size_t length);

/* Copies the first length bytes out; EIO where there are fewer. */
int handoff_payload_load(int fd, void *into, size_t length);

/* May be called again. Nobody can write, grow, shrink or unseal it any more; its offset is 0. */
int handoff_payload_seal(int fd);

#endif
