/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_REQUEST_H
#define HANDOFF_REQUEST_H

/*
 * What has to hold of a request and its connection before the client can be given away, and the
 * two things that are done to them: the rest of the request's body is read, and what httpd still
 * has to write is written.
 *
 * Functions that may refuse return 0, an HTTP status to answer with, or HANDOFF_CLIENT_LEFT; the
 * refusal is already logged, and *result says what to count.
 */

#include "httpd.h"

#include "handoff_detach.h"
#include "handoff_result.h"

/* Not an HTTP status: there is nobody left to answer. */
#define HANDOFF_CLIENT_LEFT (-1)

/* Why headers of this request's handler are ignored, in words for the operator, or NULL. Asked
 * before the handler runs, because mod_proxy_fcgi changes r->filename while it does. */
const char *handoff_why_may_not_ask(const request_rec *r);

/* Refuses connections that are more than the bytes on their socket: TLS, HTTP/2, HTTP/0.9, and
 * those with a filter that we do not know. Nothing was read or written. */
int handoff_refuse_connection(request_rec *r, handoff_result *result);

/* Reads and throws away what the application left of the request's body, within bounds of bytes
 * and time. Not the body of a client that still waits for 100 Continue: it has sent nothing.
 * *interrupted is watched meanwhile: httpd's input filters answer some errors by sending an error
 * bucket down the output filters, where we find it. */
int handoff_drain_body(request_rec *r, const int *interrupted, handoff_result *result);

/* Writes out what earlier, pipelined requests left in the connection's filters. */
int handoff_flush_connection(request_rec *r, handoff_result *result);

/* Bytes of the request's body that were announced and not sent, because the client still waits for
 * 100 Continue; -1 where it did not say how many. Valid after the drain. */
apr_int64_t handoff_unread_body(const request_rec *r);

/* Bytes behind the request that httpd read already, and nobody will see: a pipelined request.
 * Exact: all others are still in the socket. */
apr_size_t handoff_prefetched(request_rec *r, const handoff_detach *detach);

#endif
