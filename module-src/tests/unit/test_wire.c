/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_wire.h"
#include "tap.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static char path[] = "/tmp/handoff-wire-XXXXXX/d.sock";
static int opened;                          /* how often the wire asked for the name */

static int open_path(void *baton)
{
    opened++;
    return open(baton, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

static handoff_wire_order order_for(int connect_ms, int send_ms, int retries)
{
    handoff_wire_order order = { open_path, path, connect_ms, send_ms, retries };

    opened = 0;
    return order;
}

static void address_of(struct sockaddr_un *address)
{
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    strncpy(address->sun_path, path, sizeof(address->sun_path) - 1);
}

static int listen_as(int type, int backlog)
{
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

    address_of(&address);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0
        || (type != SOCK_DGRAM && listen(fd, backlog) != 0)) {
        perror("listen_as");
        exit(1);
    }
    return fd;
}

/* Receives all there is on one connection; returns the bytes, the first descriptor in *fd. */
static size_t receive(int listener, char *bytes, size_t room, int *fd, int *count)
{
    int conn = accept(listener, NULL, NULL);
    size_t total = 0;

    *fd = -1;
    *count = 0;
    for (;;) {
        union {
            char space[CMSG_SPACE(sizeof(int) * 8)];
            struct cmsghdr align;
        } control;
        struct iovec iov = { bytes + total, room - total };
        struct msghdr msg;
        struct cmsghdr *cmsg;
        ssize_t n;

        memset(&msg, 0, sizeof(msg));
        msg.msg_iov = &iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        n = recvmsg(conn, &msg, MSG_CMSG_CLOEXEC);
        if (n <= 0) {
            break;
        }
        total += (size_t)n;
        for (cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
            int got = (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int));

            memcpy(fd, CMSG_DATA(cmsg), sizeof(int));
            *count += got;
        }
    }
    close(conn);
    return total;
}

static int count_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    while (readdir(dir) != NULL) {
        count++;
    }
    closedir(dir);
    return count;
}

static int same_pipe(int a, int b)
{
    struct stat x;
    struct stat y;

    return a >= 0 && b >= 0 && fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_ino == y.st_ino;
}

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
        int fd;
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
        total = receive(listener, bytes, 300000, &fd, &count);
        ok(cases[i].length == 0 ? total == 1 && bytes[0] == '\0'
           : total == cases[i].length && memcmp(bytes, data, total) == 0,
           "%s: the bytes arrive%s", cases[i].name, cases[i].length ? "" : " as one NUL");
        ok(count == 1 && same_pipe(fd, client), "%s: with exactly the client's descriptor",
           cases[i].name);
        close(fd);
        close(listener);
    }
    free(bytes);
    free(data);
}

static void two_descriptors_arrive_in_order(int client)
{
    int listener = listen_as(SOCK_SEQPACKET, 4);
    handoff_wire_order order = order_for(150, 100, 0);
    handoff_wire_report report;
    handoff_wire_message message;
    char bytes[16];
    int fd;
    int count;
    int other[2];

    if (pipe(other) != 0) {
        exit(1);
    }
    handoff_wire_plain(&message, "x", 1, client);
    message.fds[message.fd_count++] = other[0];
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT,
       "a message with two descriptors is sent");
    receive(listener, bytes, sizeof(bytes), &fd, &count);
    ok(count == 2 && same_pipe(fd, client), "both arrive, the client first");
    close(fd);
    close(fd + 1);
    close(other[0]);
    close(other[1]);
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
    char *slash = strrchr(path, '/');
    int client[2];
    int before;

    *slash = '\0';
    if (mkdtemp(path) == NULL || pipe(client) != 0) {
        perror("setup");
        return 1;
    }
    *slash = '/';
    before = count_descriptors();

    plain_messages_arrive(client[0]);
    two_descriptors_arrive_in_order(client[0]);
    too_large_is_told_with_the_limit(client[0]);
    a_dead_daemon_is_told_after_the_retries(client[0]);
    a_daemon_that_restarts_gets_the_message(client[0]);
    a_full_backlog_is_waited_for_and_no_longer(client[0]);
    a_daemon_that_hangs_up_never_kills_the_sender(client[0]);
    local_failures_are_told(client[0]);

    ok(count_descriptors() == before, "no descriptor is leaked, the client's is still open");
    unlink(path);
    *slash = '\0';
    rmdir(path);
    return tap_end();
}
