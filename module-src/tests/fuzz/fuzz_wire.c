/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/* A daemon that does as the input says: how it listens, and for each connection what it answers
 * and whether it hangs up before it reads. Whatever it does, the client's descriptor is either
 * delivered and that is known, or nobody has it and that is known. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "fuzz.h"

#include "../unit/peer.h"

#include <errno.h>
#include <pthread.h>

#define MAX_MESSAGE 600
#define MAX_FDS 8

/* The daemon, in a thread of its own while a message is delivered. */
typedef struct {
    int listener;
    fuzz_input script;
    size_t received;              /* bytes, by the last connection that was read                  */
    int fds;                      /* descriptors, by all connections                              */
    int has_read;                 /* whether the last connection was read to its end              */
    int answered;                 /* its first byte to the last connection, -1                    */
} scripted;

static void *play(void *baton)
{
    scripted *daemon = baton;
    char bytes[MAX_MESSAGE + 1];
    int fds[MAX_FDS];
    int conn;

    while ((conn = accept(daemon->listener, NULL, NULL)) >= 0) {
        unsigned int act = take_byte(&daemon->script);
        unsigned int answers = act >> 1 & 3;
        int count = 0;

        daemon->answered = -1;
        daemon->has_read = 0;
        daemon->received = 0;
        for (; answers > 0; answers--) {
            unsigned char answer = (unsigned char)take_byte(&daemon->script);

            if (daemon->answered < 0) {
                daemon->answered = answer;
            }
            (void)!send(conn, &answer, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        }
        if (act & 8) {
            (void)shutdown(conn, SHUT_WR);
        }
        if (!(act & 1)) {
            /* Of what a daemon answered and Apache did not read, the kernel makes an ECONNRESET when
             * Apache hangs up: once, and before the message. Who reads on gets it all the same. */
            do {
                errno = 0;
                daemon->received += receive_all(conn, bytes, sizeof(bytes), fds, &count);
                daemon->fds += count;
                while (count > 0) {
                    close(fds[--count]);
                }
            } while (errno == ECONNRESET);
            daemon->has_read = 1;
        }
        close(conn);
    }
    return NULL;
}

static int devnull = -1;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    unsigned int flags = take_byte(&in);
    size_t length = 1 + take_byte(&in) * 2;
    handoff_wire_order order = order_for(5, 5, flags >> 2 & 3);
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    scripted daemon;
    pthread_t thread;
    char *bytes;
    int before;

    if (devnull < 0) {
        make_place();
        atexit(remove_place);
        devnull = open("/dev/null", O_RDWR | O_CLOEXEC);
        PROMISE(devnull >= 0);
    }
    before = count_descriptors();

    order.wants_ack = flags & 1;
    order.transport = (handoff_transport)((flags >> 4 & 3) % 3);
    order.peer_uid = flags & 64 ? (long long)getuid() + (flags >> 7) : -1;
    bytes = malloc(length);
    PROMISE(bytes != NULL);
    memset(bytes, 'm', length);
    handoff_wire_plain(&message, bytes, length, devnull);
    if (in.size % 2 == 1) {
        message.fds[message.fd_count++] = devnull;
    }

    memset(&daemon, 0, sizeof(daemon));
    daemon.listener = listen_as(flags & 2 ? SOCK_STREAM : SOCK_SEQPACKET, 8);
    daemon.script = in;
    PROMISE(pthread_create(&thread, NULL, play, &daemon) == 0);
    outcome = handoff_wire_deliver(&message, &order, &report);
    PROMISE(shutdown(daemon.listener, SHUT_RDWR) == 0);
    PROMISE(pthread_join(thread, NULL) == 0);
    close(daemon.listener);

    PROMISE(report.attempts >= 1 && report.attempts <= order.max_retries + 1);
    PROMISE(report.elapsed_us >= 0 && report.elapsed_us < 5 * 1000 * 1000);
    PROMISE((report.error == 0) == (outcome == HANDOFF_WIRE_SENT) || outcome != HANDOFF_WIRE_SENT);
    if (outcome == HANDOFF_WIRE_SENT) {
        PROMISE(!order.wants_ack || daemon.answered == HANDOFF_WIRE_ACK);
        PROMISE(order.peer_uid < 0 || order.peer_uid == (long long)getuid());
        if (daemon.has_read) {
            PROMISE(daemon.received == length);
            PROMISE(daemon.fds == (int)message.fd_count);
        }
    }
    else if (outcome != HANDOFF_WIRE_SENT_SHORT) {
        PROMISE(daemon.fds == 0);
    }
    PROMISE(fcntl(devnull, F_GETFD) == FD_CLOEXEC);
    PROMISE(count_descriptors() == before);
    free(bytes);
    return 0;
}
