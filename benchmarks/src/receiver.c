/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Takes clients and answers each with the same bytes; the other half of a handoff, as cheap as it
 * can be made so that it does not hide what Apache costs. Also a TCP server that does nothing
 * else, for the load generator's ceiling.
 *
 * usage: receiver KIND:WHERE...
 *
 *   seqpacket:PATH   one message per connection, with the client in it (plain and envelope)
 *   ack:PATH         the same, but says ACK first (wire protocol, ack=on)
 *   stream:PATH      the message ends at end of file, and then the client is answered
 *   fdpass:PATH      mod_proxy_fdpass: the head is already written, only the body is
 *   tcp:PORT         no handoff at all: accepts on 127.0.0.1, reads a request, answers it
 *
 * Prints "ready" when it listens; on SIGUSR1 one line of JSON with what it counted so far; ends on
 * SIGTERM. One thread and one epoll; a client is closed as the wire protocol wants it: FIN, then
 * read until the client's own FIN, then close. Nobody is given a deadline: the benchmark ends it.
 */

#define _GNU_SOURCE 1

#include "answer.h"
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 4096
#define MAX_FD 65536
#define ACK 0x06

typedef enum {
    FREE,
    SIGNALS,
    LISTENER,
    SENDER,                       /* a connection from Apache that will carry a client            */
    REQUEST,                      /* a TCP client whose request is not read yet                   */
    LINGER                        /* answered; waiting for the client's FIN                       */
} role;

typedef enum { SEQPACKET, ACKED, STREAM, FDPASS, TCP } kind;

static const char *const kind_names[] = { "seqpacket", "ack", "stream", "fdpass", "tcp" };

typedef struct {
    role role;
    kind kind;
    int client;                   /* SENDER of STREAM: arrived with the first bytes, or -1        */
} slot;

static slot slots[MAX_FD];
static char buffer[1 << 20];
static int epoll_fd;
static unsigned long long handoffs, answers, message_bytes, payload_bytes, failures;

static void watch(int fd, role as, kind what)
{
    struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

    if (fd >= MAX_FD) {
        errno = EMFILE;
        die("descriptor");
    }
    slots[fd].role = as;
    slots[fd].kind = what;
    slots[fd].client = -1;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        die("epoll_ctl");
    }
}

/* close(2) also takes it out of the epoll: nobody has a copy of it by then. */
static void drop(int fd)
{
    slots[fd].role = FREE;
    close(fd);
}

static void answer(int fd, kind what)
{
    static const char whole[] = ANSWER_HEAD ANSWER_BODY;
    const char *bytes = what == FDPASS ? ANSWER_BODY : whole;
    size_t length = what == FDPASS ? sizeof(ANSWER_BODY) - 1 : sizeof(whole) - 1;

    if (send(fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) {
        failures++;
    }
    answers++;
    (void)shutdown(fd, SHUT_WR);
}

static void take_client(int fd, kind what)
{
    handoffs++;
    answer(fd, what);
    watch(fd, LINGER, what);
}

/* Returns the client, or -1 when there was none in this piece; *n is what recvmsg said. */
static int receive(int fd, kind what, ssize_t *n)
{
    union {
        char space[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = { .iov_base = buffer, .iov_len = sizeof(buffer) };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                          .msg_controllen = sizeof(control.space) };
    struct cmsghdr *cmsg;
    int fds[2] = { -1, -1 };

    *n = recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (*n == 0 && what != STREAM) {
        /* "What a daemon must do", 9, in docs/wire-protocol.md. */
        msg.msg_controllen = sizeof(control.space);
        *n = recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    }
    if (*n <= 0) {
        return -1;
    }
    message_bytes += (unsigned long long)*n;
    if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        failures++;
    }
    cmsg = CMSG_FIRSTHDR(&msg);
    if (cmsg == NULL || cmsg->cmsg_type != SCM_RIGHTS) {
        return -1;
    }
    memcpy(fds, CMSG_DATA(cmsg), cmsg->cmsg_len - CMSG_LEN(0));
    if (fds[1] >= 0) {
        struct stat st;

        payload_bytes += fstat(fds[1], &st) == 0 ? (unsigned long long)st.st_size : 0;
        close(fds[1]);
    }
    return fds[0];
}

static void on_sender(int fd)
{
    kind what = slots[fd].kind;

    for (;;) {
        ssize_t n;
        int client = receive(fd, what, &n);

        if (n < 0 && errno == EAGAIN) {
            return;
        }
        if (client >= 0 && what == STREAM) {
            slots[fd].client = client;
            continue;                   /* the end of the message is the end of the file */
        }
        if (n > 0 && client < 0 && what == STREAM) {
            continue;
        }
        if (client < 0) {
            client = slots[fd].client;
        }
        drop(fd);
        if (client >= 0) {
            take_client(client, what);
        }
        else {
            failures++;
        }
        return;
    }
}

static void on_listener(int fd)
{
    static const char ack = ACK;
    kind what = slots[fd].kind;
    int peer = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

    if (peer < 0) {
        if (errno != EAGAIN && errno != ECONNABORTED) {
            die("accept");
        }
        return;
    }
    if (what == TCP) {
        watch(peer, REQUEST, what);
        return;
    }
    if (what == ACKED && send(peer, &ack, 1, MSG_NOSIGNAL) != 1) {
        failures++;
    }
    watch(peer, SENDER, what);
    if (what != ACKED) {
        on_sender(peer);                /* it is there already, more often than not */
    }
}

/* The request of the benchmark fits into one segment. */
static void on_request(int fd)
{
    ssize_t n = recv(fd, buffer, sizeof(buffer), 0);

    if (n > 4 && memcmp(buffer + n - 4, "\r\n\r\n", 4) == 0) {
        answer(fd, TCP);
        slots[fd].role = LINGER;
    }
    else if (n >= 0 || errno != EAGAIN) {
        failures++;
        drop(fd);
    }
}

static void on_linger(int fd)
{
    for (;;) {
        ssize_t n = recv(fd, buffer, sizeof(buffer), 0);

        if (n < 0 && errno == EAGAIN) {
            return;
        }
        if (n <= 0) {
            drop(fd);
            return;
        }
    }
}

static void on_signal(int fd)
{
    struct signalfd_siginfo info;

    if (read(fd, &info, sizeof(info)) != sizeof(info) || info.ssi_signo != SIGUSR1) {
        exit(0);
    }
    printf("{\"handoffs\": %llu, \"answers\": %llu, \"message_bytes\": %llu, "
           "\"payload_bytes\": %llu, \"failures\": %llu}\n",
           handoffs, answers, message_bytes, payload_bytes, failures);
    fflush(stdout);
}

static void listen_at(const char *text)
{
    const char *where = strchr(text, ':');
    size_t i;
    int fd = -1;

    for (i = 0; i < sizeof(kind_names) / sizeof(kind_names[0]) && where != NULL; i++) {
        size_t len = strlen(kind_names[i]);

        if (strncmp(text, kind_names[i], len) == 0 && text + len == where) {
            break;
        }
    }
    if (where == NULL || i > TCP) {
        fprintf(stderr, "\"%s\" is not KIND:WHERE\n", text);
        exit(2);
    }
    where++;
    if (i == TCP) {
        struct sockaddr_in address = { .sin_family = AF_INET,
                                       .sin_port = htons((uint16_t)atoi(where)),
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        int on = 1;

        fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0
            || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
            die(text);
        }
    }
    else {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int type = i == SEQPACKET || i == ACKED ? SOCK_SEQPACKET : SOCK_STREAM;

        if (strlen(where) >= sizeof(address.sun_path)) {
            errno = ENAMETOOLONG;
            die(text);
        }
        strcpy(address.sun_path, where);
        fd = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0
            || chmod(where, 0666) != 0) {
            die(text);
        }
    }
    if (listen(fd, BACKLOG) != 0) {
        die(text);
    }
    watch(fd, LISTENER, (kind)i);
}

static void watch_signals(void)
{
    sigset_t set;
    int fd;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    fd = signalfd(-1, &set, SFD_CLOEXEC);
    if (fd < 0) {
        die("signalfd");
    }
    watch(fd, SIGNALS, TCP);
}

int main(int argc, char **argv)
{
    struct epoll_event events[256];
    int i;

    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (argc < 2 || epoll_fd < 0) {
        fprintf(stderr, "usage: receiver KIND:WHERE...   (see the top of receiver.c)\n");
        return 2;
    }
    watch_signals();
    for (i = 1; i < argc; i++) {
        listen_at(argv[i]);
    }
    puts("ready");
    fflush(stdout);

    for (;;) {
        int n = epoll_wait(epoll_fd, events, sizeof(events) / sizeof(events[0]), -1);

        if (n < 0 && errno != EINTR) {
            die("epoll_wait");
        }
        for (i = 0; i < n; i++) {
            int fd = events[i].data.fd;

            switch (slots[fd].role) {
            case SIGNALS:  on_signal(fd);   break;
            case LISTENER: on_listener(fd); break;
            case SENDER:   on_sender(fd);   break;
            case REQUEST:  on_request(fd);  break;
            case LINGER:   on_linger(fd);   break;
            case FREE:     break;
            }
        }
    }
}
