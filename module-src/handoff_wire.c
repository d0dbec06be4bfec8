/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* The kernel keeps this much of SO_SNDBUF for itself (unix_dgram_sendmsg: len > sndbuf - 32). */
#define SEQPACKET_OVERHEAD 32

/* The first pause between two attempts; each further one is twice as long. */
#define FIRST_PAUSE_MS 10

static int64_t now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void pause_ms(int ms)
{
    (void)poll(NULL, 0, ms);
}

/* Not the daemon's fault: this process, or the system, is out of something. */
static int is_our_lack(int err)
{
    return err == EMFILE || err == ENFILE || err == ENOMEM || err == ENOBUFS;
}

/* A daemon that restarts, or is busy for a moment, looks like this. */
static int is_transient(handoff_wire_outcome outcome, int err)
{
    if (outcome == HANDOFF_WIRE_NOT_ACKED) {
        return err == ECONNRESET;
    }
    switch (err) {
    case ENOENT:
    case ECONNREFUSED:
    case ECONNRESET:
    case EPIPE:
    case EAGAIN:
    case ETOOMANYREFS:
        return 1;
    default:
        return 0;
    }
}

/* Lets the next call on fd block until the deadline. Sockets begin non-blocking, because nearly
 * always there is nothing to wait for. When there is, poll(2) would be of no use: connect(2) to a
 * full backlog answers EAGAIN (AF_UNIX never says EINPROGRESS) and no event tells when to try again.
 * A blocking connect(2) or sendmsg(2) waits in the kernel, and SO_SNDTIMEO ends that. */
static int wait_until(int fd, int64_t deadline)
{
    int64_t left = deadline - now_us();
    struct timeval tv;

    if (left <= 0) {
        return EAGAIN;
    }
    tv.tv_sec = (time_t)(left / 1000000);
    tv.tv_usec = (suseconds_t)(left % 1000000);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) != 0
        || fcntl(fd, F_SETFL, 0) != 0) {
        return errno;
    }
    return 0;
}

static int connect_until(int fd, const struct sockaddr_un *address, int64_t deadline)
{
    int waits = 0;

    for (;;) {
        if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0) {
            /* What this call was allowed to wait is not what the next one may. */
            return waits && fcntl(fd, F_SETFL, O_NONBLOCK) != 0 ? errno : 0;
        }
        if (errno != EINTR && (errno != EAGAIN || waits)) {
            return errno;
        }
        waits = waits || errno == EAGAIN;
        if (waits) {
            int err = wait_until(fd, deadline);

            if (err != 0) {
                return err;
            }
        }
    }
}

/* Connects to the socket behind an O_PATH descriptor. Going through /proc/self/fd reaches the very
 * inode that was checked, and frees us from the 108 bytes of sun_path. */
static handoff_wire_outcome connect_name(int name, handoff_transport transport, int64_t deadline,
                                         int *fd, handoff_wire_report *report)
{
    static const struct {
        int type;
        handoff_transport only;   /* that asks for it, besides AUTO                               */
    } kinds[] = {
        { SOCK_SEQPACKET, HANDOFF_TRANSPORT_SEQPACKET },
        { SOCK_STREAM, HANDOFF_TRANSPORT_STREAM },
    };
    struct sockaddr_un address;
    size_t i;

    memset(&address, 0, sizeof(address));
    address.sun_family = AF_UNIX;
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d", name);

    for (i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (transport != HANDOFF_TRANSPORT_AUTO && transport != kinds[i].only) {
            continue;
        }
        *fd = socket(AF_UNIX, kinds[i].type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (*fd < 0) {
            report->error = errno;
            return HANDOFF_WIRE_LOCAL_FAILED;
        }
        report->is_stream = kinds[i].type == SOCK_STREAM;
        report->error = connect_until(*fd, &address, deadline);
        if (report->error == 0) {
            return HANDOFF_WIRE_SENT;
        }
        close(*fd);
        *fd = -1;
        if (report->error != EPROTOTYPE) {
            break;
        }
    }
    return is_our_lack(report->error) ? HANDOFF_WIRE_LOCAL_FAILED : HANDOFF_WIRE_CONNECT_FAILED;
}

/* Who called listen(2). Nothing has been sent yet, so a stranger learns only that Apache came. */
static handoff_wire_outcome check_peer(int fd, long long wanted, handoff_wire_report *report)
{
    struct ucred peer;
    socklen_t length = sizeof(peer);

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
        report->error = errno;
        return HANDOFF_WIRE_LOCAL_FAILED;
    }
    report->peer_uid = (long long)peer.uid;
    if (report->peer_uid != wanted) {
        report->error = EPERM;
        return HANDOFF_WIRE_WRONG_PEER;
    }
    return HANDOFF_WIRE_SENT;
}

/* Room for two bytes, so that a daemon that says more than one is not taken for one of ours. */
static handoff_wire_outcome await_ack(int fd, int64_t deadline, handoff_wire_report *report)
{
    unsigned char said[2];
    struct pollfd answer = { .fd = fd, .events = POLLIN };
    ssize_t n = -1;

    do {
        /* Rounded up, or the last part of a millisecond would be spent spinning. */
        int64_t left = (deadline - now_us() + 999) / 1000;

        report->error = EAGAIN;
        if (left > 0) {
            int ready = poll(&answer, 1, (int)left);

            if (ready > 0) {
                n = recv(fd, said, sizeof(said), MSG_DONTWAIT);
            }
            report->error = ready == 0 ? EAGAIN : n < 0 ? errno : 0;
        }
    } while (report->error == EINTR);

    if (n == 1 && said[0] == HANDOFF_WIRE_ACK) {
        return HANDOFF_WIRE_SENT;
    }
    if (n == 1 && said[0] == HANDOFF_WIRE_NAK) {
        report->error = EBUSY;
        return HANDOFF_WIRE_REFUSED;
    }
    if (n >= 0) {
        report->error = n == 0 ? ECONNRESET : EPROTO;
    }
    return HANDOFF_WIRE_NOT_ACKED;
}

static ssize_t send_some(int fd, const char *bytes, size_t length,
                         const handoff_wire_message *with_fds)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * HANDOFF_WIRE_MAX_FDS)];
        struct cmsghdr header;    /* for its alignment, and because it comes first                */
    } control;
    struct iovec iov = { .iov_base = (void *)(uintptr_t)bytes, .iov_len = length };
    struct msghdr msg;

    memset(&msg, 0, sizeof(msg));
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    if (with_fds != NULL) {
        size_t size = sizeof(int) * with_fds->fd_count;
        struct cmsghdr *cmsg = &control.header;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(size);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(cmsg), with_fds->fds, size);
    }
    return sendmsg(fd, &msg, MSG_NOSIGNAL);
}

/* The same limit for both kinds of socket. For SOCK_STREAM it also keeps the message within what
 * the kernel buffers for a fresh connection, so that it goes out in one call in practice. */
static size_t message_limit(int fd)
{
    int size = 0;
    socklen_t len = sizeof(size);

    if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &len) != 0 || size <= SEQPACKET_OVERHEAD) {
        return 0;
    }
    return (size_t)size - SEQPACKET_OVERHEAD;
}

size_t handoff_wire_limit(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    size_t limit = fd >= 0 ? message_limit(fd) : 0;

    if (fd >= 0) {
        close(fd);
    }
    return limit > HANDOFF_WIRE_ALWAYS_FITS ? limit : HANDOFF_WIRE_ALWAYS_FITS;
}

static handoff_wire_outcome send_message(int fd, const handoff_wire_message *message,
                                         int64_t deadline, handoff_wire_report *report)
{
    const char *bytes = message->bytes;
    size_t sent = 0;
    int waits = 0;

    if (message->length > HANDOFF_WIRE_ALWAYS_FITS) {
        report->limit = message_limit(fd);
        if (message->length > report->limit) {
            report->error = EMSGSIZE;
            return HANDOFF_WIRE_TOO_LARGE;
        }
    }
    while (sent < message->length) {
        ssize_t n = -1;

        report->error = waits ? wait_until(fd, deadline) : 0;
        if (report->error == 0) {
            n = send_some(fd, bytes + sent, message->length - sent, sent == 0 ? message : NULL);
            report->error = n < 0 ? errno : 0;
        }
        if (n > 0) {
            sent += (size_t)n;
        }
        else if (report->error == EAGAIN && !waits) {
            waits = 1;
        }
        else if (report->error != EINTR) {
            if (sent > 0) {
                return HANDOFF_WIRE_SENT_SHORT;
            }
            if (is_our_lack(report->error)) {
                return HANDOFF_WIRE_LOCAL_FAILED;
            }
            return report->error == EMSGSIZE ? HANDOFF_WIRE_TOO_LARGE : HANDOFF_WIRE_SEND_FAILED;
        }
    }
    report->error = 0;
    return HANDOFF_WIRE_SENT;
}

static handoff_wire_outcome attempt(const handoff_wire_message *message,
                                    const handoff_wire_order *order, int64_t connect_by,
                                    int64_t done_by, handoff_wire_report *report)
{
    handoff_wire_outcome outcome;
    int name = order->open_name(order->baton);
    int fd = -1;

    if (name < 0) {
        report->error = errno;
        return is_our_lack(errno) ? HANDOFF_WIRE_LOCAL_FAILED : HANDOFF_WIRE_OPEN_FAILED;
    }
    outcome = connect_name(name, order->transport, connect_by, &fd, report);
    close(name);
    if (outcome != HANDOFF_WIRE_SENT) {
        return outcome;
    }
    if (order->peer_uid >= 0) {
        outcome = check_peer(fd, order->peer_uid, report);
    }
    if (outcome == HANDOFF_WIRE_SENT && order->wants_ack) {
        outcome = await_ack(fd, done_by, report);
    }
    if (outcome == HANDOFF_WIRE_SENT) {
        outcome = send_message(fd, message, done_by, report);
    }
    close(fd);
    return outcome;
}

void handoff_wire_plain(handoff_wire_message *message, const void *data, size_t length,
                        int client_fd)
{
    static const char nothing[1] = { '\0' };

    memset(message, 0, sizeof(*message));
    message->bytes = length > 0 ? data : nothing;
    message->length = length > 0 ? length : sizeof(nothing);
    message->fds[0] = client_fd;
    message->fd_count = 1;
}

handoff_wire_outcome handoff_wire_deliver(const handoff_wire_message *message,
                                          const handoff_wire_order *order,
                                          handoff_wire_report *report)
{
    int64_t start = now_us();
    int64_t connect_by = start + (int64_t)order->connect_timeout_ms * 1000;
    int64_t done_by = connect_by + (int64_t)order->send_timeout_ms * 1000;
    int pause = FIRST_PAUSE_MS;
    handoff_wire_outcome outcome;

    memset(report, 0, sizeof(*report));
    report->peer_uid = -1;
    if (message->length == 0 || message->fd_count == 0
        || message->fd_count > HANDOFF_WIRE_MAX_FDS) {
        report->error = EINVAL;
        return HANDOFF_WIRE_LOCAL_FAILED;
    }
    for (;;) {
        report->attempts++;
        outcome = attempt(message, order, connect_by, done_by, report);
        if (outcome == HANDOFF_WIRE_SENT || outcome == HANDOFF_WIRE_SENT_SHORT
            || !is_transient(outcome, report->error)
            || report->attempts > order->max_retries
            || now_us() + (int64_t)pause * 1000 >= connect_by) {
            break;
        }
        pause_ms(pause);
        pause *= 2;
    }
    report->elapsed_us = (long)(now_us() - start);
    return outcome;
}
