/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_DETACH_H
#define HANDOFF_DETACH_H

/*
 * Takes a client's socket away from httpd. The only room that knows how.
 *
 * httpd keeps many references to a connection's socket: the core filters' own, the MPM's poll
 * descriptor, the connection config, pool cleanups, the list for an ungraceful stop. Which of them
 * a public function can replace differs between versions and MPMs. All of them hold the same
 * number, so the number is what we change: an unconnected socket is put in its place with dup3(2).
 * Every reference stays valid and now names a socket on which reading, writing, shutdown and
 * SO_LINGER reach nobody, and httpd's copy of the client is closed in the same instant.
 *
 * handoff_detach_prepare does everything that can fail. It is called before the client is sent, so
 * that nothing can fail afterwards; then exactly one of commit and abandon is called.
 */

#include "httpd.h"

typedef struct {
    conn_rec *c;
    int client_fd;                /* httpd's descriptor of the client, still httpd's              */
    int dead_fd;                  /* ours: an unconnected socket                                  */
} handoff_detach;

/* Fails with the errno as status, having changed nothing. */
apr_status_t handoff_detach_prepare(handoff_detach *detach, conn_rec *c);

/* Between the two httpd reads nothing from the client: what it finds, it has read before. No call of
 * the kernel's, and nothing that another thread of httpd could see but the number. */
void handoff_detach_hide(const handoff_detach *detach);
void handoff_detach_show(const handoff_detach *detach);

/* After the client was sent: from here on httpd cannot reach it, and the connection ends when the
 * request does. */
apr_status_t handoff_detach_commit(handoff_detach *detach);

/* Whether the client of this connection was given away earlier. */
int handoff_is_detached(conn_rec *c);

/* The client was not sent: undoes prepare; the connection goes on as before. */
void handoff_detach_abandon(handoff_detach *detach);

#endif
