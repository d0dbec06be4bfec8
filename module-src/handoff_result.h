/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_RESULT_H
#define HANDOFF_RESULT_H

/*
 * What became of one request that asked for a handoff, or of one attempt at one target. The same
 * word stands in the access log (%{handoff-result}n), on the status page and in its metrics.
 *
 * No types of httpd here. The order is the order of the counters in shared memory: append only,
 * and a change makes a new layout (handoff_counters.h).
 */

/*      constant                 word */
#define HANDOFF_RESULTS(X) \
    X(HANDOFF_SENT,              "sent")               /* the daemon has the client and the message */ \
    X(HANDOFF_SENT_SHORT,        "sent-short")         /* it has the client, not the message's end  */ \
    X(HANDOFF_HEAD,              "head")               /* HEAD, answered by the application         */ \
    X(HANDOFF_IGNORED,           "ignored")            /* asked by one who may not ask              */ \
    X(HANDOFF_CLIENT_GONE,       "client-gone")        /* the client left before                    */ \
    X(HANDOFF_REFUSED_PATH,      "refused-path")       /* the path or name is not permitted         */ \
    X(HANDOFF_REFUSED_DATA,      "refused-data")       /* headers that contradict each other        */ \
    X(HANDOFF_REFUSED_TLS,       "refused-tls")                                                        \
    X(HANDOFF_REFUSED_HTTP2,     "refused-http2")                                                      \
    X(HANDOFF_REFUSED_HTTP09,    "refused-http09")                                                     \
    X(HANDOFF_REFUSED_FILTER,    "refused-filter")     /* an unknown connection filter              */ \
    X(HANDOFF_REFUSED_BODY,      "refused-body")       /* the rest of the request's body            */ \
    X(HANDOFF_APPLICATION_FAILED, "application-failed")                                                \
    X(HANDOFF_TOO_LARGE,         "too-large")          /* the message, or the payload               */ \
    X(HANDOFF_NO_DAEMON,         "no-daemon")                                                          \
    X(HANDOFF_NO_PERMISSION,     "no-permission")                                                      \
    X(HANDOFF_WRONG_USER,        "wrong-user")         /* SO_PEERCRED is not what user= says        */ \
    X(HANDOFF_NO_PROC,           "no-proc")                                                            \
    X(HANDOFF_NO_RESOURCES,      "no-resources")       /* Apache is out of descriptors or memory    */ \
    X(HANDOFF_DAEMON_BUSY,       "daemon-busy")        /* backlog full, NAK, too many in flight     */ \
    X(HANDOFF_DAEMON_SILENT,     "daemon-silent")      /* accepted, and no ACK in time              */ \
    X(HANDOFF_DAEMON_FAILED,     "daemon-failed")      /* hung up, or answered nonsense             */ \
    X(HANDOFF_SKIPPED,           "skipped")            /* not tried: it failed too often just now   */

#define HANDOFF_RESULT_CONSTANT(constant, word) constant,
typedef enum { HANDOFF_RESULTS(HANDOFF_RESULT_CONSTANT) HANDOFF_RESULT_COUNT } handoff_result;
#undef HANDOFF_RESULT_CONSTANT

/* The word. Static; never NULL. */
const char *handoff_result_name(handoff_result result);

#endif
