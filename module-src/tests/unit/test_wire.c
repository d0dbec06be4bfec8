/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "peer.h"
#include "tap.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>

static void plain_messages_arrive(int client)
{
    static const struct {
        const char *name;
        int type;
        size_t length;
    } cases[] = {
        { "seqpacket, no data", SOCK_SEQPACKET, 0 },
        { "seqpacket, 17 bytes", SOCK_SEQPACKET, 17 },
        { "seqpacket, 200000 bytes", SOCK_SEQPACKET, 200000 },
        { "stream, no data", SOCK_STREAM, 0 },
        { "stream, 17 bytes", SOCK_STREAM, 17 },
        { "stream, 200000 bytes", SOCK_STREAM, 200000 },
    };
    char *data = malloc(300000);
    char *bytes = malloc(300000);
    size_t i;

    for (i = 0; i < 300000; i++) {
        data[i] = (char)('a' + i % 23);
    }
    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int listener = listen_as(cases[i].type, 4);
        handoff_wire_order order = order_for(150, 100, 2);
        handoff_wire_message message;
        handoff_wire_report report;
        handoff_wire_outcome outcome;
        int fds[8];
        int count;
        size_t total;

        handoff_wire_plain(&message, data, cases[i].length, client);
        outcome = handoff_wire_deliver(&message, &order, &report);
        if (!ok(outcome == HANDOFF_WIRE_SENT && report.error == 0 && report.attempts == 1
                && report.is_stream == (cases[i].type == SOCK_STREAM), "%s: is sent",
                cases[i].name)) {
            close(listener);
            continue;
        }
        total = receive(listener, bytes, 300000, fds, &count);
        ok(cases[i].length == 0 ? total == 1 && bytes[0] == '\0'
           : total == cases[i].length && memcmp(bytes, data, total) == 0,
           "%s: the bytes arrive%s", cases[i].name, cases[i].length ? "" : " as one NUL");
        ok(count == 1 && same_pipe(fds[0], client), "%s: with exactly the client's descriptor",
           cases[i].name);
        close(fds[0]);
        close(listener);
    }
    free(bytes);
    free(data);
}

static void two_descriptors_arrive_in_order(int client)
{
    static const int types[] = { SOCK_SEQPACKET, SOCK_STREAM };
    size_t i;

    for (i = 0; i < 2; i++) {
        int listener = listen_as(types[i], 4);
        handoff_wire_order order = order_for(150, 100, 0);
        handoff_wire_report report;
        handoff_wire_message message;
        char bytes[16];
        int fds[8];
        int count;
        int other[2];

        if (pipe(other) != 0) {
            exit(1);
        }
        handoff_wire_plain(&message, "x", 1, client);
        message.fds[message.fd_count++] = other[0];
        ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT,
           "%s: a message with two descriptors is sent", i ? "stream" : "seqpacket");
        receive(listener, bytes, sizeof(bytes), fds, &count);
        ok(count == 2 && same_pipe(fds[0], client) && same_pipe(fds[1], other[0]),
           "%s: both arrive, the client first", i ? "stream" : "seqpacket");
        close(fds[0]);
        close(fds[1]);
        close(other[0]);
        close(other[1]);
        close(listener);
    }
}

static void what_nobody_can_send_is_refused(int client)
{
    int listener = listen_as(SOCK_SEQPACKET, 4);
    handoff_wire_order order = order_for(150, 100, 2);
    handoff_wire_message message;
    handoff_wire_report report;

    handoff_wire_plain(&message, "x", 1, client);
    message.length = 0;
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_LOCAL_FAILED
       && report.error == EINVAL && opened == 0, "no bytes: nobody is asked");
    handoff_wire_plain(&message, "x", 1, client);
    message.fd_count = 0;
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_LOCAL_FAILED
       && report.error == EINVAL && opened == 0, "no descriptor: nobody is asked");
    message.fd_count = HANDOFF_WIRE_MAX_FDS + 1;
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_LOCAL_FAILED
       && report.error == EINVAL && opened == 0, "too many descriptors: nobody is asked");
    close(listener);
}

static void too_large_is_told_with_the_limit(int client)
{
    static const int types[] = { SOCK_SEQPACKET, SOCK_STREAM };
    char *data = calloc(1, 8000000);
    size_t i;

    for (i = 0; i < 2; i++) {
        int listener = listen_as(types[i], 4);
        handoff_wire_order order = order_for(150, 100, 2);
        handoff_wire_message message;
        handoff_wire_report report;
        handoff_wire_outcome outcome;
        size_t limit;

        handoff_wire_plain(&message, data, 8000000, client);
        outcome = handoff_wire_deliver(&message, &order, &report);
        limit = report.limit;
        ok(outcome == HANDOFF_WIRE_TOO_LARGE && report.error == EMSGSIZE && report.attempts == 1,
           "%s: a message of 8 MB is too large and not retried", i ? "stream" : "seqpacket");
        handoff_wire_plain(&message, data, limit, client);
        ok(limit > 100000
           && handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT,
           "%s: a message of exactly the limit goes through", i ? "stream" : "seqpacket");
        handoff_wire_plain(&message, data, limit + 1, client);
        ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_TOO_LARGE,
           "%s: one byte more does not", i ? "stream" : "seqpacket");
        close(listener);
    }
    free(data);
}

static void a_dead_daemon_is_told_after_the_retries(int client)
{
    handoff_wire_order order = order_for(150, 100, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    int fd;

    handoff_wire_plain(&message, "x", 1, client);
    unlink(path);
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_OPEN_FAILED && report.error == ENOENT, "no socket: ENOENT");
    ok(report.attempts == 3 && opened == 3, "after the first attempt and two retries");
    ok(report.elapsed_us >= 30000 && report.elapsed_us < 1000000, "and soon");

    close(listen_as(SOCK_SEQPACKET, 4));
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.error == ECONNREFUSED,
       "nobody listens: ECONNREFUSED");
    order = order_for(150, 100, 0);
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.attempts == 1, "no retries: one attempt");
    order = order_for(25, 1, 10);
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.elapsed_us < 500000,
       "many retries end at the deadline");

    fd = listen_as(SOCK_DGRAM, 0);
    order = order_for(150, 100, 2);
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.error == EPROTOTYPE
       && report.attempts == 1, "a datagram socket: EPROTOTYPE, not retried");
    close(fd);
}

static void the_transport_is_what_the_order_says(int client)
{
    static const struct {
        const char *name;
        int type;
        handoff_transport transport;
        handoff_wire_outcome outcome;
        int is_stream;
    } cases[] = {
        { "auto, seqpacket listens", SOCK_SEQPACKET, HANDOFF_TRANSPORT_AUTO, HANDOFF_WIRE_SENT, 0 },
        { "auto, stream listens", SOCK_STREAM, HANDOFF_TRANSPORT_AUTO, HANDOFF_WIRE_SENT, 1 },
        { "seqpacket, seqpacket listens", SOCK_SEQPACKET, HANDOFF_TRANSPORT_SEQPACKET,
          HANDOFF_WIRE_SENT, 0 },
        { "seqpacket, stream listens", SOCK_STREAM, HANDOFF_TRANSPORT_SEQPACKET,
          HANDOFF_WIRE_CONNECT_FAILED, 0 },
        { "stream, stream listens", SOCK_STREAM, HANDOFF_TRANSPORT_STREAM, HANDOFF_WIRE_SENT, 1 },
        { "stream, seqpacket listens", SOCK_SEQPACKET, HANDOFF_TRANSPORT_STREAM,
          HANDOFF_WIRE_CONNECT_FAILED, 1 },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int listener = listen_as(cases[i].type, 4);
        handoff_wire_order order = order_for(150, 100, 2);
        handoff_wire_message message;
        handoff_wire_report report;
        handoff_wire_outcome outcome;

        order.transport = cases[i].transport;
        handoff_wire_plain(&message, "x", 1, client);
        outcome = handoff_wire_deliver(&message, &order, &report);
        ok(outcome == cases[i].outcome && report.is_stream == cases[i].is_stream
           && report.error == (outcome == HANDOFF_WIRE_SENT ? 0 : EPROTOTYPE)
           && report.attempts == 1, "transport %s: %s", cases[i].name,
           cases[i].outcome == HANDOFF_WIRE_SENT ? "sent" : "EPROTOTYPE, not retried");
        close(listener);
    }
}

static void *listen_a_little_later(void *baton)
{
    (void)baton;
    poll(NULL, 0, 15);
    return (void *)(intptr_t)listen_as(SOCK_SEQPACKET, 4);
}

static void a_daemon_that_restarts_gets_the_message(int client)
{
    handoff_wire_order order = order_for(1000, 100, 5);
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    pthread_t thread;
    void *listener;

    close(listen_as(SOCK_SEQPACKET, 4));
    pthread_create(&thread, NULL, listen_a_little_later, NULL);
    handoff_wire_plain(&message, "x", 1, client);
    outcome = handoff_wire_deliver(&message, &order, &report);
    pthread_join(thread, &listener);
    ok(outcome == HANDOFF_WIRE_SENT && report.attempts > 1,
       "a socket made anew between two attempts is found");
    close((int)(intptr_t)listener);
}

static void a_full_backlog_is_waited_for_and_no_longer(int client)
{
    int listener = listen_as(SOCK_SEQPACKET, 0);
    int fillers[8];
    size_t filled = 0;
    handoff_wire_order order = order_for(120, 100, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    struct sockaddr_un address;

    address_of(&address);
    while (filled < 8) {
        fillers[filled] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (connect(fillers[filled], (struct sockaddr *)&address, sizeof(address)) != 0) {
            close(fillers[filled]);
            break;
        }
        filled++;
    }
    ok(filled < 8, "the backlog is full");
    handoff_wire_plain(&message, "x", 1, client);
    outcome = handoff_wire_deliver(&message, &order, &report);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.error == EAGAIN, "it ends with EAGAIN");
    ok(report.elapsed_us >= 110000 && report.elapsed_us < 1000000,
       "after waiting for the connect timeout and not much longer");
    while (filled > 0) {
        close(fillers[--filled]);
    }
    close(listener);
}

static void *accept_and_close(void *baton)
{
    int listener = *(int *)baton;
    int conn;

    while ((conn = accept(listener, NULL, NULL)) >= 0) {
        close(conn);
    }
    return NULL;
}

static void a_daemon_that_hangs_up_never_kills_the_sender(int client)
{
    int listener = listen_as(SOCK_STREAM, 16);
    handoff_wire_order order = order_for(150, 100, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    pthread_t thread;
    int i;
    int odd = 0;

    pthread_create(&thread, NULL, accept_and_close, &listener);
    handoff_wire_plain(&message, "x", 1, client);
    for (i = 0; i < 200; i++) {
        handoff_wire_outcome outcome = handoff_wire_deliver(&message, &order, &report);

        odd += outcome != HANDOFF_WIRE_SENT && outcome != HANDOFF_WIRE_SEND_FAILED;
    }
    ok(odd == 0, "a daemon that hangs up gives an outcome, not a SIGPIPE");
    shutdown(listener, SHUT_RDWR);
    pthread_join(thread, NULL);
    close(listener);
}

static int opens_nothing(void *baton)
{
    errno = *(int *)baton;
    return -1;
}

static void what_this_process_lacks_is_not_the_daemons_fault(int client)
{
    static const int lacks[] = { EMFILE, ENFILE, ENOMEM };
    handoff_wire_message message;
    handoff_wire_report report;
    size_t i;

    handoff_wire_plain(&message, "x", 1, client);
    for (i = 0; i < sizeof(lacks) / sizeof(lacks[0]); i++) {
        int lack = lacks[i];
        handoff_wire_order order = order_for(50, 50, 0);

        order.open_name = opens_nothing;
        order.baton = &lack;
        ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_LOCAL_FAILED
           && report.error == lack, "%s is told as our own lack", strerror(lack));
    }
}

static void local_failures_are_told(int client)
{
    handoff_wire_order order = order_for(150, 100, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    int listener = listen_as(SOCK_SEQPACKET, 4);

    if (geteuid() != 0) {
        chmod(path, 0);
        handoff_wire_plain(&message, "x", 1, client);
        ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_CONNECT_FAILED
           && report.error == EACCES && report.attempts == 1,
           "a socket without write permission: EACCES, not retried");
    }
    handoff_wire_plain(&message, "x", 1, 999999);
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SEND_FAILED
       && report.error == EBADF, "a descriptor that is none: EBADF, nothing sent");
    close(listener);
}

int main(void)
{
    static void (*const tests[])(int client) = {
        plain_messages_arrive,
        two_descriptors_arrive_in_order,
        what_nobody_can_send_is_refused,
        too_large_is_told_with_the_limit,
        a_dead_daemon_is_told_after_the_retries,
        the_transport_is_what_the_order_says,
        a_daemon_that_restarts_gets_the_message,
        a_full_backlog_is_waited_for_and_no_longer,
        a_daemon_that_hangs_up_never_kills_the_sender,
        local_failures_are_told,
        what_this_process_lacks_is_not_the_daemons_fault,
        NULL,
    };

    return run_with_client(tests);
}
