/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * The streaming daemon that does nothing else: what is left of a measurement when the daemon costs
 * as little as it can. Takes handoffs and writes "tokens" events at "tokens_per_second", as the
 * message asks, each by a system call of its own; it understands no message beyond those two.
 *
 * usage: nullstream SOCKET [fdpass]
 *
 * With fdpass it is what mod_proxy_fdpass hands clients to: a SOCK_STREAM socket, a head that is already
 * written, and nothing that says how much is wanted: one event per second until the client leaves.
 *
 * Prints "ready" when it listens. One thread, one epoll, one look at all streams per millisecond.
 */

#define _GNU_SOURCE 1

#include "common.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 4096
#define MAX_FD 65536
#define SWEEP (SECOND / 1000)
#define FASTEST 1000.0                  /* tokens per second that need no clock */

#define HEAD \
    "HTTP/1.1 200 OK\r\n" \
    "Date: Sun, 22 Nov 2026 12:00:00 GMT\r\n" \
    "Content-Type: text/event-stream; charset=utf-8\r\n" \
    "Cache-Control: no-cache\r\n" \
    "Connection: close\r\n" \
    "Transfer-Encoding: chunked\r\n" \
    "X-Accel-Buffering: no\r\n" \
    "\r\n"
#define EVENT "1e\r\ndata: {\"content\":\" nothing\"}\n\n\r\n"
#define BARE_EVENT "data: {\"content\":\" nothing\"}\n\n"
#define END "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

typedef struct {
    long left;                          /* events still to write; 0: not streaming */
    double pace;
    int64_t due;
} stream;

static stream streams[MAX_FD];
static int epoll_fd, highest;
static int fdpass;

/* The number behind a name in JSON, whatever quotes and backslashes are between the two. */
static double number_of(const char *text, const char *name, double otherwise)
{
    const char *at = strstr(text, name);

    if (at == NULL) {
        return otherwise;
    }
    at += strlen(name);
    return strtod(at + strspn(at, "\\\": "), NULL);
}

static void drop(int fd)
{
    streams[fd].left = 0;
    close(fd);
}

static void put(int fd, const char *bytes, size_t length)
{
    (void)!send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void go_on(int fd, int64_t now)
{
    stream *s = &streams[fd];

    while (s->left > 0 && (s->pace >= FASTEST || s->due <= now)) {
        put(fd, fdpass ? BARE_EVENT : EVENT, (fdpass ? sizeof(BARE_EVENT) : sizeof(EVENT)) - 1);
        s->left--;
        s->due += (int64_t)(SECOND / s->pace);
        if (s->left == 0) {
            put(fd, END, sizeof(END) - 1);
            (void)shutdown(fd, SHUT_WR);
        }
    }
}

static void begin(int fd, const char *message)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP, .data.fd = fd };
    stream *s = &streams[fd];

    s->left = fdpass ? LONG_MAX : (long)number_of(message, "\"tokens\\\"", 10);
    s->pace = fdpass ? 1 : number_of(message, "tokens_per_second", 20);
    s->due = now_ns();
    highest = fd > highest ? fd : highest;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        die("epoll_ctl");
    }
    /* Head and first event in one piece, as a daemon that knows its business. */
    if (fdpass) {
        put(fd, BARE_EVENT, sizeof(BARE_EVENT) - 1);
    }
    else {
        put(fd, HEAD EVENT, sizeof(HEAD EVENT) - 1);
    }
    s->left--;
    s->due += (int64_t)(SECOND / s->pace);
    go_on(fd, s->due - 1);
}

static int take(int peer)
{
    static char message[1 << 18];
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = { .iov_base = message, .iov_len = sizeof(message) - 1 };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                          .msg_controllen = sizeof(control.space) };
    struct cmsghdr *cmsg;
    ssize_t n = recvmsg(peer, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    int fd;

    if (n == 0) {
        /* "What a daemon must do", 9, in docs/wire-protocol.md. */
        msg.msg_controllen = sizeof(control.space);
        n = recvmsg(peer, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    }
    if (n < 0 && errno == EAGAIN) {
        return 0;
    }
    close(peer);
    cmsg = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
    if (cmsg != NULL && cmsg->cmsg_type == SCM_RIGHTS) {
        memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
        message[n] = '\0';
        begin(fd, message);
    }
    return 1;
}

static void on_listener(int listener)
{
    int i;

    for (i = 0; i < 8; i++) {
        int peer = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (peer < 0) {
            if (errno != EAGAIN && errno != ECONNABORTED) {
                die("accept");
            }
            return;
        }
        /* The generator sends before it does anything else. */
        while (!take(peer)) {
        }
    }
}

static void on_client(int fd)
{
    static char scrap[65536];
    ssize_t n = recv(fd, scrap, sizeof(scrap), MSG_DONTWAIT);

    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        drop(fd);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event ready[256], event = { .events = EPOLLIN };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct rlimit files;
    int64_t swept = 0;
    int listener;

    fdpass = argc == 3 && strcmp(argv[2], "fdpass") == 0;
    if (argc != 2 + fdpass || strlen(argv[1]) >= sizeof(address.sun_path)) {
        fprintf(stderr, "usage: nullstream SOCKET [fdpass]\n");
        return 2;
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max < MAX_FD ? files.rlim_max : MAX_FD;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    strcpy(address.sun_path, argv[1]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    listener = socket(AF_UNIX, (fdpass ? SOCK_STREAM : SOCK_SEQPACKET) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    event.data.fd = listener;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0
        || listen(listener, BACKLOG) != 0
        || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event) != 0) {
        die(argv[1]);
    }
    puts("ready");
    fflush(stdout);

    for (;;) {
        int n = epoll_wait(epoll_fd, ready, sizeof(ready) / sizeof(ready[0]), 1);
        int64_t now = now_ns();
        int i;

        for (i = 0; i < n; i++) {
            if (ready[i].data.fd == listener) {
                on_listener(listener);
            }
            else {
                on_client(ready[i].data.fd);
            }
        }
        if (now >= swept + SWEEP) {
            swept = now;
            for (i = 0; i <= highest; i++) {
                if (streams[i].left > 0) {
                    go_on(i, now);
                }
            }
        }
    }
}
