/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_deliver.h"

#include "apr_strings.h"
#include "http_core.h"
#include "http_log.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "handoff_config.h"
#include "handoff_describe.h"
#include "handoff_detach.h"
#include "handoff_filter.h"
#include "handoff_payload.h"
#include "handoff_status.h"
#include "handoff_wire.h"

APLOG_USE_MODULE(socket_handoff);

/* A daemon that restarts is back sooner; browsers and load balancers take whole seconds. */
#define RETRY_AFTER_SECONDS 2

/* --- what went wrong, for the client, the access log and the operator ------------------------- */

typedef struct {
    handoff_wire_outcome outcome;
    int error;                    /* errno, or 0 for any                                          */
    int status;
    handoff_result result;
    const char *advice;
} failure;

static const failure failures[] = {
    { HANDOFF_WIRE_OPEN_FAILED, ELOOP, HTTP_FORBIDDEN, HANDOFF_REFUSED_PATH,
      "a symlink lies on the way; name the socket itself" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOTSOCK, HTTP_FORBIDDEN, HANDOFF_REFUSED_PATH,
      "that is not a socket; name the daemon's socket" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOTDIR, HTTP_FORBIDDEN, HANDOFF_REFUSED_PATH,
      "the way leads through something that is no directory; name the daemon's socket" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOENT, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_DAEMON,
      "there is no such socket; start the daemon or its systemd socket unit" },
    { HANDOFF_WIRE_OPEN_FAILED, EACCES, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_PERMISSION,
      "Apache's user may not search the socket's directory; allow it to" },
    { HANDOFF_WIRE_CONNECT_FAILED, ECONNREFUSED, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_DAEMON,
      "nobody listens on the socket; start the daemon or its systemd socket unit" },
    { HANDOFF_WIRE_CONNECT_FAILED, EAGAIN, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_BUSY,
      "the daemon's backlog stayed full; see whether it hangs, or raise its backlog" },
    { HANDOFF_WIRE_CONNECT_FAILED, EACCES, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_PERMISSION,
      "Apache's user may not write to the socket; set its group and mode (SocketGroup=, "
      "SocketMode=0660)" },
    { HANDOFF_WIRE_CONNECT_FAILED, EPROTOTYPE, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_DAEMON,
      "the daemon listens on another kind of socket; let it listen on SOCK_SEQPACKET, or correct "
      "transport= of the target" },
    { HANDOFF_WIRE_CONNECT_FAILED, ENOENT, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_PROC,
      "/proc is missing, sockets are reached through /proc/self/fd; mount it for Apache" },
    { HANDOFF_WIRE_NOT_ACKED, EAGAIN, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_SILENT,
      "the daemon did not acknowledge it in time; see whether it hangs, and whether it knows of "
      "ack=on" },
    { HANDOFF_WIRE_NOT_ACKED, EPROTO, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_FAILED,
      "the daemon answered something else than an acknowledgement; see whether that is the right "
      "socket" },
    { HANDOFF_WIRE_NOT_ACKED, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_FAILED,
      "the daemon hung up instead of acknowledging the connection; see its log" },
    { HANDOFF_WIRE_REFUSED, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_BUSY,
      "the daemon takes no more clients now; see its limits" },
    { HANDOFF_WIRE_SEND_FAILED, ETOOMANYREFS, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_BUSY,
      "too many descriptors wait for the daemon to receive them; see whether it hangs, or raise "
      "Apache's LimitNOFILE" },
    { HANDOFF_WIRE_SEND_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_DAEMON_FAILED,
      "the daemon accepted the connection and took no message; see its log" },
    { HANDOFF_WIRE_TOO_LARGE, 0, HTTP_INTERNAL_SERVER_ERROR, HANDOFF_TOO_LARGE,
      "the message is too large; let the target say envelope=on and pass the data as "
      HANDOFF_HEADER_DATA_FROM ": " HANDOFF_DATA_FROM_BODY ", or put it where the daemon can fetch "
      "it" },
    { HANDOFF_WIRE_LOCAL_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_RESOURCES,
      "no socket could be made; raise Apache's LimitNOFILE" },
    { HANDOFF_WIRE_WRONG_PEER, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_WRONG_USER,
      "who listens there is not the user= of the target; find out who does" },
};

static const failure *find_failure(handoff_wire_outcome outcome, int error, int is_declared)
{
    static const failure other = {
        HANDOFF_WIRE_CONNECT_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_DAEMON,
        "the socket cannot be reached; see whether the daemon runs"
    };
    static const failure undeclared = {
        HANDOFF_WIRE_CONNECT_FAILED, EPROTOTYPE, HTTP_SERVICE_UNAVAILABLE, HANDOFF_NO_DAEMON,
        "who listens there does not listen on SOCK_SEQPACKET, and a path that nobody declared is "
        "spoken to in no other way; if it is the daemon, write SocketHandoffTarget NAME unix:PATH "
        "transport=stream, and SocketHandoffAllow NAME where it may be used"
    };
    size_t i;

    if (!is_declared && outcome == undeclared.outcome && error == undeclared.error) {
        return &undeclared;
    }
    for (i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
        if (failures[i].outcome == outcome
            && (failures[i].error == 0 || failures[i].error == error)) {
            return &failures[i];
        }
    }
    return &other;
}

/* Whether it is the target's fault, so that another one may do better and this one may be skipped;
 * not the message's, nor ours. */
static int is_the_targets_fault(handoff_wire_outcome outcome, int error)
{
    /* ETOOMANYREFS: descriptors wait for any daemon at all, and this one need not be it. */
    return outcome != HANDOFF_WIRE_TOO_LARGE && outcome != HANDOFF_WIRE_LOCAL_FAILED
           && error != ETOOMANYREFS;
}

/* Whether it will pass: somebody wrote that path, or made that file, and a target that is skipped for a
 * while would only hide it behind a 503. */
static int may_pass(const failure *why)
{
    return why->status != HTTP_FORBIDDEN;
}

static void retry_after(request_rec *r, int seconds)
{
    /* err_headers_out is what survives into an ErrorDocument. */
    apr_table_setn(r->err_headers_out, "Retry-After", apr_itoa(r->pool, seconds));
}

/* --- notes for the access log -------------------------------------------------------------------- */

static const char *const note_names[] = {
    HANDOFF_NOTE_TARGET, HANDOFF_NOTE_RESULT, HANDOFF_NOTE_TIME, HANDOFF_NOTE_ID
};

#define NOTE_COUNT (sizeof(note_names) / sizeof(note_names[0]))

void handoff_note(request_rec *r, const char *name, const char *value)
{
    for (; r != NULL; r = r->prev) {
        if (value != NULL) {
            apr_table_setn(r->notes, name, value);
        }
        else {
            apr_table_unset(r->notes, name);
        }
    }
}

void handoff_forget_notes(request_rec *r)
{
    size_t i;

    for (i = 0; i < NOTE_COUNT; i++) {
        handoff_note(r, note_names[i], NULL);
    }
}

void handoff_inherit_notes(request_rec *r)
{
    size_t i;

    for (i = 0; i < NOTE_COUNT; i++) {
        const char *value = apr_table_get(r->prev->notes, note_names[i]);

        if (value != NULL) {
            apr_table_setn(r->notes, note_names[i], value);
        }
    }
}

void handoff_note_result(request_rec *r, const handoff_declared_target *declared,
                         handoff_result result)
{
    handoff_note(r, HANDOFF_NOTE_RESULT, handoff_result_name(result));
    handoff_status_count(declared, result);
}

/* --- the data beside the message ----------------------------------------------------------------- */

static apr_status_t close_payload(void *baton)
{
    handoff_wish *wish = baton;

    if (wish->payload_fd >= 0) {
        close(wish->payload_fd);
        wish->payload_fd = -1;
    }
    return APR_SUCCESS;
}

int handoff_open_payload(request_rec *r, handoff_wish *wish)
{
    wish->payload_fd = handoff_payload_open();
    if (wish->payload_fd < 0) {
        return errno;
    }
    apr_pool_cleanup_register(r->pool, wish, close_payload, apr_pool_cleanup_null);
    return 0;
}

static apr_uint64_t length_of_data(const handoff_wish *wish)
{
    return wish->data != NULL ? wish->data_length : wish->payload_length;
}

/* --- one target -------------------------------------------------------------------------------- */

static int open_target(void *baton)
{
    return handoff_target_open(baton);
}

static const char *target_name(const handoff_wish *wish, const handoff_declared_target *target)
{
    return target != NULL ? target->name : wish->asked;
}

static handoff_wire_order order_for(const handoff_server_config *config,
                                    const handoff_declared_target *target, handoff_target *socket)
{
    handoff_wire_order order;

    order.open_name = open_target;
    order.baton = socket;
    /* Below the default prefix lie the sockets of the whole system, nearly all of them SOCK_STREAM:
     * another application's FastCGI, Docker. None of them is a daemon of ours by the mere fact that
     * an application names it, and its data could be any request to it. */
    order.transport = HANDOFF_TRANSPORT_SEQPACKET;
    order.wants_ack = 0;
    order.peer_uid = -1;
    order.connect_timeout_ms = config->connect_timeout_ms;
    order.send_timeout_ms = config->send_timeout_ms;
    order.max_retries = config->max_retries;
    if (target != NULL) {
        order.transport = target->transport;
        order.wants_ack = target->ack;
        order.peer_uid = target->user_id;
        if (target->timeout_ms > 0) {
            order.connect_timeout_ms = target->timeout_ms;
            order.send_timeout_ms = 0;
        }
        if (target->retries >= 0) {
            order.max_retries = target->retries;
        }
    }
    return order;
}

static void log_failure(request_rec *r, const handoff_wish *wish,
                        const handoff_declared_target *target, const failure *why,
                        const handoff_wire_report *report, const char *then)
{
    apr_status_t error = APR_FROM_OS_ERROR(report->error);
    const char *name = target_name(wish, target);

    if (why->outcome == HANDOFF_WIRE_TOO_LARGE) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, error, r, "handoff to %s failed: %s (the data has %"
                      APR_UINT64_T_FMT " bytes, a message takes %" APR_SIZE_T_FMT ")%s", name,
                      why->advice, length_of_data(wish),
                      report->limit, then);
    }
    else if (why->outcome == HANDOFF_WIRE_WRONG_PEER) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff to %s failed: %s (uid %"
                      APR_INT64_T_FMT " listens, user=%s is uid %" APR_INT64_T_FMT ")%s", name,
                      why->advice, (apr_int64_t)report->peer_uid, target->user,
                      (apr_int64_t)target->user_id, then);
    }
    else {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, error, r, "handoff to %s failed: %s (%d attempt%s, "
                      "%ld ms)%s", name, why->advice, report->attempts,
                      report->attempts == 1 ? "" : "s", report->elapsed_us / 1000, then);
    }
}

/* Tells the others how the target is doing, and the operator when that changes something. */
static void report_health(request_rec *r, const handoff_declared_target *target, int worked)
{
    if (target == NULL || !handoff_status_report(target, worked)) {
        return;
    }
    if (worked) {
        ap_log_rerror(APLOG_MARK, APLOG_NOTICE, 0, r, "target %s works again", target->name);
    }
    else {
        ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, r, "target %s failed %d times in a row and is "
                      "skipped for %d ms", target->name, target->max_fails, target->retry_ms);
    }
}

static void take_client_away(request_rec *r, handoff_detach *detach, const char *name)
{
    apr_status_t rv = handoff_detach_commit(detach);

    if (rv != APR_SUCCESS) {
        ap_log_rerror(APLOG_MARK, APLOG_CRIT, rv, r, "handoff to %s: Apache could not let go of "
                      "the client; the connection is closed instead", name);
    }
}

static void log_success(request_rec *r, const handoff_wish *wish, const char *name,
                        const handoff_wire_message *message, handoff_wire_outcome outcome,
                        const handoff_wire_report *report)
{
    if (outcome == HANDOFF_WIRE_SENT_SHORT) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(report->error), r, "handoff to %s: "
                      "the daemon took the client but not the whole message; see its log", name);
    }
    ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "client handed to %s in %ld us: %s, message of %"
                  APR_SIZE_T_FMT " bytes with %d descriptor%s, %" APR_UINT64_T_FMT " bytes of data, "
                  "%d attempt%s", name, report->elapsed_us,
                  report->is_stream ? "stream" : "seqpacket", message->length,
                  (int)message->fd_count, message->fd_count == 1 ? "" : "s",
                  length_of_data(wish),
                  report->attempts, report->attempts == 1 ? "" : "s");
}

/* --- the target and its backups ---------------------------------------------------------------- */

/* The next target that can take this request: a plain message does not say HEAD. */
static const handoff_declared_target *next_backup(const request_rec *r,
                                                  const handoff_declared_target *target)
{
    const handoff_declared_target *next = target != NULL ? target->backup : NULL;

    while (next != NULL && r->header_only && !next->envelope) {
        next = next->backup;
    }
    return next;
}

static int deliver(request_rec *r, handoff_wish *wish, handoff_detach *detach)
{
    const handoff_server_config *config = handoff_server_config_of(r->server);
    const handoff_declared_target *target = wish->declared;
    int status = HTTP_SERVICE_UNAVAILABLE;
    int wait_seconds = RETRY_AFTER_SECONDS;

    for (;;) {
        const handoff_declared_target *next = next_backup(r, target);
        const char *name = target_name(wish, target);
        const char *then = next != NULL
                           ? apr_psprintf(r->pool, "; its backup %s is tried", next->name) : "";
        handoff_target socket = target != NULL ? target->socket : wish->socket;
        handoff_wire_order order = order_for(config, target, &socket);
        int wait_ms = 0;
        int turn = target == NULL ? 1
                   : handoff_status_may_try(target,
                                            order.connect_timeout_ms + order.send_timeout_ms,
                                            &wait_ms);

        handoff_note(r, HANDOFF_NOTE_TARGET, name);
        if (turn == 0) {
            ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "target %s is skipped for another %d ms%s",
                          name, wait_ms, then);
            handoff_note_result(r, target, HANDOFF_SKIPPED);
            status = HTTP_SERVICE_UNAVAILABLE;
            wait_seconds = (wait_ms + 999) / 1000;
        }
        else {
            handoff_wire_message message;
            handoff_wire_report report;
            handoff_wire_outcome outcome;
            handoff_result built;
            const failure *why;

            status = handoff_describe(r, wish, target, detach, &message, &built);
            if (status != 0) {
                handoff_note_result(r, target, built);
                if (turn == HANDOFF_TRY_ALONE) {
                    handoff_status_release(target);
                }
                return status;
            }
            ap_log_rerror(APLOG_MARK, APLOG_TRACE2, 0, r, "connecting to %s, message of %"
                          APR_SIZE_T_FMT " bytes%s", name, message.length,
                          order.wants_ack ? ", waiting for its ACK" : "");
            outcome = handoff_wire_deliver(&message, &order, &report);
            if (outcome == HANDOFF_WIRE_SENT || outcome == HANDOFF_WIRE_SENT_SHORT) {
                take_client_away(r, detach, name);
                report_health(r, target, 1);
                log_success(r, wish, name, &message, outcome, &report);
                handoff_note_result(r, target, outcome == HANDOFF_WIRE_SENT ? HANDOFF_SENT
                                                                            : HANDOFF_SENT_SHORT);
                handoff_status_sent(target, report.elapsed_us,
                                    length_of_data(wish));
                return 0;
            }
            why = find_failure(outcome, report.error, target != NULL);
            if (!is_the_targets_fault(outcome, report.error)) {
                next = NULL;
                then = "";
            }
            log_failure(r, wish, target, why, &report, then);
            handoff_note_result(r, target, why->result);
            if (is_the_targets_fault(outcome, report.error) && may_pass(why)) {
                report_health(r, target, 0);
            }
            else if (turn == HANDOFF_TRY_ALONE) {
                handoff_status_release(target);
            }
            status = why->status;
            wait_seconds = RETRY_AFTER_SECONDS;
        }
        if (next == NULL) {
            break;
        }
        target = next;
    }
    if (status == HTTP_SERVICE_UNAVAILABLE) {
        retry_after(r, wait_seconds);
    }
    return status;
}

int handoff_deliver(request_rec *r, handoff_wish *wish)
{
    handoff_detach detach;
    apr_status_t rv = handoff_detach_prepare(&detach, r->connection);
    int status;

    if (rv != APR_SUCCESS) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, rv, r, "handoff to %s failed: no socket could be made "
                      "to take the client's place; raise Apache's LimitNOFILE", wish->asked);
        handoff_note_result(r, wish->declared, HANDOFF_NO_RESOURCES);
        retry_after(r, RETRY_AFTER_SECONDS);
        return HTTP_SERVICE_UNAVAILABLE;
    }
    handoff_save_session(r);
    status = deliver(r, wish, &detach);
    if (status != 0) {
        handoff_detach_abandon(&detach);
    }
    handoff_note(r, HANDOFF_NOTE_TIME,
                 apr_psprintf(r->pool, "%" APR_TIME_T_FMT, apr_time_now() - wish->began));
    return status;
}
