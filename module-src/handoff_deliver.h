/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_DELIVER_H
#define HANDOFF_DELIVER_H

/*
 * Gives one client to one target, or to its backup, or to nobody: builds the message that each
 * target wants, passes over targets that failed too often just now, and says for the client, the
 * access log, the status page and the operator what went wrong.
 *
 * After handoff_deliver returned 0 the client is no longer httpd's.
 */

#include "httpd.h"

#include "handoff_config.h"
#include "handoff_result.h"
#include "handoff_target.h"

/* Notes for the access log, %{handoff-target}n and so on. The log may ask the first request of a chain
 * of internal redirects (%<) or its last (%>), and an application may be any of them: behind
 * mod_rewrite it is the last, and a failed one has its ErrorDocument behind it. So the whole chain
 * tells the same: what is noted is noted backwards, and what comes later inherits it. */
#define HANDOFF_NOTE_TARGET "handoff-target"
#define HANDOFF_NOTE_RESULT "handoff-result"
#define HANDOFF_NOTE_TIME "handoff-time"
#define HANDOFF_NOTE_ID "handoff-id"

/* What the application wishes. Of one request, in its pool. */
typedef struct {
    const char *asked;            /* the name or path, as the application wrote it                */
    const handoff_declared_target *declared;  /* NULL: a path below SocketHandoffAllowedPrefix    */
    handoff_target socket;        /* that path                                                    */
    const char *data;             /* from the header, or NULL                                     */
    apr_size_t data_length;
    int payload_fd;               /* the data in a memfd, or -1                                   */
    apr_uint64_t payload_length;
    const char *id;               /* that daemons are told, or NULL: none was yet                 */
    apr_time_t began;             /* when the application's output had ended                      */
} handoff_wish;

/* Opens the memfd for data that does not come in a header; closed with the request. Returns 0 or an
 * errno. */
int handoff_open_payload(request_rec *r, handoff_wish *wish);

/* Returns 0, or the HTTP status to answer with. Blocks for at most the deadlines of the target and
 * its backups. The request's body is drained and the connection flushed. */
int handoff_deliver(request_rec *r, handoff_wish *wish);

/* In this request and those that led to it; value NULL: no longer. */
void handoff_note(request_rec *r, const char *name, const char *value);

/* All of them: another wish begins. */
void handoff_forget_notes(request_rec *r);

/* The request that r->prev became is told what happened until now. */
void handoff_inherit_notes(request_rec *r);

/* Writes the result's note and counts; declared is NULL where no declared target is concerned. */
void handoff_note_result(request_rec *r, const handoff_declared_target *declared,
                         handoff_result result);

#endif
