/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_WIRE_H
#define HANDOFF_WIRE_H

/*
 * Delivers one message with descriptors to a daemon: connect, send, retry, all before one deadline.
 *
 * Rules of this room: plain libc, no httpd or APR type, no logging, no allocation. It never closes
 * or changes a descriptor that it was given to send. docs/wire-protocol.md is the contract.
 *
 * Ownership turns on one instant: the return of the sendmsg(2) that carried the descriptors.
 * Before it the daemon has nothing and the caller may still answer the client; after it the
 * daemon owns the client and the caller must not touch it again, whatever else fails. The two
 * outcomes HANDOFF_WIRE_SENT and HANDOFF_WIRE_SENT_SHORT are the ones after it.
 */

#include <stddef.h>

/* The client and, in an envelope, the payload. */
#define HANDOFF_WIRE_MAX_FDS 2

/* What a daemon says after it accepted a connection of a target with ack=on: one byte. */
#define HANDOFF_WIRE_ACK 0x06     /* ready to receive the message                                 */
#define HANDOFF_WIRE_NAK 0x15     /* not now; Apache tries the next target, or answers 503        */

typedef enum {
    HANDOFF_TRANSPORT_AUTO,       /* SOCK_SEQPACKET, or what the daemon listens on                */
    HANDOFF_TRANSPORT_SEQPACKET,
    HANDOFF_TRANSPORT_STREAM
} handoff_transport;

typedef enum {
    HANDOFF_WIRE_SENT,            /* the daemon has the whole message and the descriptors         */
    HANDOFF_WIRE_SENT_SHORT,      /* it has the descriptors but not the message's end             */
    HANDOFF_WIRE_OPEN_FAILED,     /* the socket's name could not be opened                        */
    HANDOFF_WIRE_CONNECT_FAILED,  /* nobody accepts, or not in time                               */
    HANDOFF_WIRE_WRONG_PEER,      /* whoever listens is not order.peer_uid; see report.peer_uid;
                                   * error EPERM                                                  */
    HANDOFF_WIRE_NOT_ACKED,       /* no ACK: error EAGAIN silence until the deadline, ECONNRESET
                                   * hung up, EPROTO said something else than ACK and NAK         */
    HANDOFF_WIRE_REFUSED,         /* NAK; error EBUSY                                             */
    HANDOFF_WIRE_SEND_FAILED,     /* connected, but nothing was taken                             */
    HANDOFF_WIRE_TOO_LARGE,       /* the message does not fit; see report.limit                   */
    HANDOFF_WIRE_LOCAL_FAILED     /* this process is out of descriptors or memory, or EINVAL: the
                                   * message has no bytes or a wrong number of descriptors        */
} handoff_wire_outcome;

/* What is sent. The bytes and the descriptors stay the caller's. */
typedef struct {
    const void *bytes;
    size_t length;                /* at least 1: an empty packet would read as end of file        */
    int fds[HANDOFF_WIRE_MAX_FDS];
    size_t fd_count;              /* at least 1                                                   */
} handoff_wire_message;

/* Where and how patiently. */
typedef struct {
    int (*open_name)(void *baton);  /* a fresh O_PATH descriptor of the socket's name, which we
                                     * close, or -1 with errno; called once per attempt, because
                                     * a restarted daemon may have made a new socket            */
    void *baton;
    handoff_transport transport;
    int wants_ack;                /* wait for one byte before the message is sent                 */
    long long peer_uid;           /* SO_PEERCRED (unix(7)) of the listener must be this; -1: any  */
    int connect_timeout_ms;       /* for finding the daemon, all attempts together                */
    int send_timeout_ms;          /* more for the message; the sum is the deadline of the whole:
                                   * finding, ACK and sending                                     */
    int max_retries;              /* attempts after the first, where it looked like a restart or a
                                   * moment's load; never after silence, NAK or a wrong peer      */
} handoff_wire_order;

typedef struct {
    int error;                    /* errno of the failure, 0 when sent                            */
    int attempts;                 /* made; 0 only when the message is one that none can send      */
    long long peer_uid;           /* who listens, where order.peer_uid asked; otherwise -1        */
    int is_stream;                /* the daemon listens on SOCK_STREAM, not SOCK_SEQPACKET        */
    size_t limit;                 /* largest message that would have fitted, for TOO_LARGE        */
    long elapsed_us;              /* spent in here                                                */
} handoff_wire_report;

/* No fresh socket takes less (SOCK_MIN_SNDBUF in the kernel), so it need not be asked. */
#define HANDOFF_WIRE_ALWAYS_FITS 4096

/* The largest message that a fresh socket takes, as net.core.wmem_default says now. */
size_t handoff_wire_limit(void);

/* Builds the plain message: the application's bytes, or one NUL byte where there are none, and
 * the client's descriptor. */
void handoff_wire_plain(handoff_wire_message *message, const void *data, size_t length,
                        int client_fd);

/* Blocks for at most connect_timeout_ms + send_timeout_ms. Thread-safe. */
handoff_wire_outcome handoff_wire_deliver(const handoff_wire_message *message,
                                          const handoff_wire_order *order,
                                          handoff_wire_report *report);

#endif
