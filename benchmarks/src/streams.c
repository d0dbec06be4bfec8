/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Hands TCP clients to a streaming daemon as Apache would, and is the clients.
 *
 * usage: streams SOCKET MESSAGE N burst | ramp RATE | loop SECONDS
 *
 *   burst          N connections are made first, then all are handed over as fast as they are taken
 *   ramp RATE      RATE handoffs per second, N in all, each with its connection
 *   loop SECONDS   N at a time; whenever an answer is complete another one begins
 *
 * SOCKET is a SOCK_SEQPACKET socket. The file MESSAGE is what is sent with each client; every
 * "@@@@@@@@" in it becomes the client's number in eight hexadecimal digits, so that everybody has an
 * id, a user and an address of his own.
 *
 * Prints a line of JSON when every client has its first event (loop: when it is over). After burst
 * and ramp the streams stay, and standard input says what next: "count SECONDS" counts events and
 * prints another line, end of file ends. Latency is from connect(2) to the daemon's socket to the
 * first byte of "data: " in the client's hands. Failures: handoff (nobody took it), status (not a
 * 200), cut (ended without [DONE]), late (nothing came for twenty seconds).
 *
 * All connections of the generator end with RST (SO_LINGER 0): no TIME_WAIT, and no entries that
 * fill the table of a connection-tracking firewall; loadgen.c says more. One thread and one epoll.
 */

#define _GNU_SOURCE 1

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

#define MAX_CLIENTS 20000
#define MAX_MESSAGE 65536
#define TAIL 32                         /* holds "data: [DONE]", the end of its chunk, and the last chunk */
#define AT_ONCE 32                      /* handoffs between two looks at what has come */
#define SOURCES 200
#define PATIENCE 20                     /* seconds in which nothing comes, one by one */
#define SECOND 1000000000LL

typedef struct {
    int fd, other;                /* ours, and the end that the daemon gets; -1: none             */
    int matched;                  /* of MARK, at the end of what has come                         */
    int began_reading, first;     /* the head's first bytes are here; so is the first event       */
    int64_t began;                /* 0: the handoff was not tried yet                             */
    unsigned have;
    char tail[TAIL];
} client;

static const char MARK[] = "\ndata: ";
static client clients[MAX_CLIENTS];
static char message[MAX_MESSAGE];
static size_t message_length;
static struct sockaddr_un target;
static struct sockaddr_in self;
static int epoll_fd, listener;
static unsigned number;

static uint32_t *latencies;             /* microseconds */
static size_t latency_count, latency_room;
static unsigned long long events, bytes, reads;
static unsigned long handed, firsts, completed, retries;
static unsigned long failed_handoff, failed_status, failed_cut, failed_late;
static int64_t last_first;

static int64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * SECOND + ts.tv_nsec;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void record(int64_t ns)
{
    if (latency_count == latency_room) {
        latency_room = latency_room != 0 ? latency_room * 2 : 65536;
        latencies = realloc(latencies, latency_room * sizeof(*latencies));
        if (latencies == NULL) {
            die("realloc");
        }
    }
    latencies[latency_count++] = (uint32_t)(ns / 1000);
}

static void read_message(const char *path)
{
    FILE *file = fopen(path, "rb");

    if (file == NULL) {
        die(path);
    }
    message_length = fread(message, 1, sizeof(message) - 1, file);
    fclose(file);
}

static void put_number(char *text)
{
    char digits[9];
    char *at = text;

    snprintf(digits, sizeof(digits), "%08x", number++);
    while ((at = strstr(at, "@@@@@@@@")) != NULL) {
        memcpy(at, digits, 8);
    }
}

/* A TCP connection whose both ends are ours. */
static void make_pair(client *c)
{
    struct sockaddr_in source = { .sin_family = AF_INET };
    struct linger reset = { .l_onoff = 1, .l_linger = 0 };
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
    struct sockaddr_in peer;
    socklen_t length = sizeof(source);
    int on = 1;

    memset(c, 0, sizeof(*c));
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        die("socket");
    }
    source.sin_addr.s_addr = htonl(0x7f000101u + number % SOURCES);
    (void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    (void)setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
    if (bind(c->fd, (struct sockaddr *)&source, sizeof(source)) != 0
        || connect(c->fd, (struct sockaddr *)&self, sizeof(self)) != 0) {
        die("connect");
    }
    if (getsockname(c->fd, (struct sockaddr *)&source, &length) != 0) {
        die("getsockname");
    }
    for (;;) {
        length = sizeof(peer);
        c->other = accept4(listener, (struct sockaddr *)&peer, &length,
                           SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (c->other < 0) {
            die("accept");
        }
        if (peer.sin_port == source.sin_port && peer.sin_addr.s_addr == source.sin_addr.s_addr) {
            break;
        }
        close(c->other);                /* somebody who tries ports */
    }
    if (fcntl(c->fd, F_SETFL, O_NONBLOCK) != 0
        || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) {
        die("client");
    }
}

static void end_client(client *c)
{
    if (c->fd >= 0) {
        close(c->fd);
    }
    if (c->other >= 0) {
        close(c->other);
    }
    c->fd = c->other = -1;
}

/* What Apache does. Returns 0 where the daemon's backlog is full: to be tried again. */
static int hand_over(client *c)
{
    static char text[MAX_MESSAGE];
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = { { 0 } };
    struct iovec iov = { .iov_base = text, .iov_len = message_length };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                          .msg_controllen = sizeof(control.space) };
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
    int fd, sent;

    if (c->began == 0) {
        c->began = now_ns();
    }
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        die("socket");
    }
    if (connect(fd, (struct sockaddr *)&target, sizeof(target)) != 0) {
        int full = errno == EAGAIN;

        close(fd);
        if (full) {
            retries++;
            return 0;
        }
        failed_handoff++;
        end_client(c);
        return 1;
    }
    memcpy(text, message, message_length + 1);
    put_number(text);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(cmsg), &c->other, sizeof(int));
    sent = sendmsg(fd, &msg, MSG_NOSIGNAL) == (ssize_t)message_length;
    close(fd);
    close(c->other);
    c->other = -1;
    if (sent) {
        handed++;
    }
    else {
        failed_handoff++;
        end_client(c);
    }
    return 1;
}

static void keep_tail(client *c, const char *data, size_t length)
{
    size_t keep;

    if (length >= TAIL) {
        memcpy(c->tail, data + length - TAIL, TAIL);
        c->have = TAIL;
        return;
    }
    keep = c->have + length > TAIL ? TAIL - length : c->have;
    memmove(c->tail, c->tail + c->have - keep, keep);
    memcpy(c->tail + keep, data, length);
    c->have = (unsigned)(keep + length);
}

static void look_at(client *c, const char *data, size_t length)
{
    size_t i;

    if (!c->began_reading) {
        c->began_reading = 1;
        if (length < 12 || memcmp(data, "HTTP/1.1 200", 12) != 0) {
            failed_status++;
            end_client(c);
            return;
        }
    }
    for (i = 0; i < length; i++) {
        if (data[i] != MARK[c->matched]) {
            c->matched = data[i] == MARK[0];
        }
        else if (++c->matched == sizeof(MARK) - 1) {
            c->matched = 0;
            events++;
            if (!c->first) {
                c->first = 1;
                firsts++;
                last_first = now_ns();
                record(last_first - c->began);
            }
        }
    }
    keep_tail(c, data, length);
}

/* Returns 1 where the client is done with. One read per call: everybody has his turn. */
static int on_readable(client *c)
{
    static char buffer[65536];
    ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

    if (n > 0) {
        reads++;
        bytes += (unsigned long long)n;
        look_at(c, buffer, (size_t)n);
        return c->fd < 0;
    }
    if (n < 0 && errno == EAGAIN) {
        return 0;
    }
    if (n == 0 && memmem(c->tail, c->have, "data: [DONE]", 12) != NULL) {
        completed++;
        events--;                       /* the mark of the end is no event */
    }
    else {
        failed_cut++;
    }
    end_client(c);
    return 1;
}

/* Handles what there is, waiting `timeout` milliseconds for it; returns how many clients are done. */
static long turn(int timeout, int *quiet)
{
    struct epoll_event ready[256];
    int n = epoll_wait(epoll_fd, ready, sizeof(ready) / sizeof(ready[0]), timeout);
    long over = 0;
    int i;

    if (n < 0 && errno != EINTR) {
        die("epoll_wait");
    }
    for (i = 0; i < n; i++) {
        client *c = ready[i].data.ptr;

        if (c->fd >= 0) {
            over += on_readable(c);
        }
    }
    *quiet = n > 0 ? 0 : *quiet + timeout;
    return over;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static double percentile_ms(double share)
{
    size_t at = (size_t)(share * (double)latency_count);

    if (latency_count == 0) {
        return 0;
    }
    return latencies[at < latency_count ? at : latency_count - 1] / 1000.0;
}

static double cpu_seconds(void)
{
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
           + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void report(double seconds, double cpu)
{
    qsort(latencies, latency_count, sizeof(*latencies), by_value);
    printf("{\"handoffs\": %lu, \"first_events\": %lu, \"completed\": %lu, \"events\": %llu, "
           "\"reads\": %llu, \"bytes\": %llu, \"retries\": %lu, \"failures\": {\"handoff\": %lu, "
           "\"status\": %lu, \"cut\": %lu, \"late\": %lu}, \"seconds\": %.6f, "
           "\"cpu_seconds\": %.6f, \"first_event_ms\": {\"p50\": %.3f, \"p99\": %.3f, "
           "\"max\": %.3f}}\n",
           handed, firsts, completed, events, reads, bytes, retries, failed_handoff, failed_status,
           failed_cut, failed_late, seconds, cpu, percentile_ms(0.5), percentile_ms(0.99),
           percentile_ms(1));
    fflush(stdout);
}

/* Opens n streams, at most `rate` per second (0: no limit), and waits for all first events. */
static void open_all(long n, double rate)
{
    int64_t start = now_ns();
    double cpu = cpu_seconds();
    long next = 0;
    int quiet = 0;

    while ((next < n || firsts + failed_handoff + failed_status + failed_cut < (unsigned long)n)
           && quiet < PATIENCE * 1000) {
        int64_t now = now_ns();
        long due = n, batch = 0;
        int full = 0, wait = 100;

        if (rate > 0) {
            due = (long)((double)(now - start) / SECOND * rate) + 1;
            due = due < n ? due : n;
        }
        while (next < due && batch++ < AT_ONCE && !full) {
            client *c = &clients[next];

            if (rate > 0 && c->began == 0) {
                make_pair(c);
            }
            if (hand_over(c)) {
                next++;
            }
            else {
                full = 1;
            }
        }
        if (full || (rate > 0 && next < n)) {
            wait = 1;
        }
        (void)turn(next < due && !full ? 0 : wait, &quiet);
    }
    failed_late += (unsigned long)n - firsts - failed_handoff - failed_status - failed_cut;
    report((double)((last_first != 0 ? last_first : now_ns()) - start) / SECOND,
           cpu_seconds() - cpu);
}

static void count(double seconds)
{
    int64_t start = now_ns(), stop = start + (int64_t)(seconds * SECOND);
    double cpu = cpu_seconds();
    int quiet = 0;

    events = bytes = reads = 0;
    while (now_ns() < stop) {
        (void)turn(10, &quiet);
    }
    report((double)(now_ns() - start) / SECOND, cpu_seconds() - cpu);
}

static void loop(long n, double seconds)
{
    int64_t start, stop;
    double cpu = cpu_seconds();
    long running = 0, i;
    int quiet = 0;

    start = now_ns();
    stop = start + (int64_t)(seconds * SECOND);
    for (i = 0; i < n; i++) {
        clients[i].fd = clients[i].other = -1;
    }
    i = 0;
    for (;;) {
        int64_t now = now_ns();
        long tried = 0;
        int full = 0;

        /* Whoever has ended begins again. */
        while (now < stop && running < n && tried++ < n && !full) {
            client *c = &clients[i];

            if (c->fd >= 0 && c->other < 0) {
                i = (i + 1) % n;
                continue;
            }
            if (c->fd < 0) {
                make_pair(c);
            }
            if (hand_over(c)) {
                running += c->fd >= 0;
                i = (i + 1) % n;
            }
            else {
                full = 1;
            }
        }
        if ((now >= stop && running == 0) || quiet >= PATIENCE * 1000) {
            break;
        }
        running -= turn(full ? 1 : 100, &quiet);
    }
    failed_late += (unsigned long)running;
    report((double)(now_ns() - start) / SECOND, cpu_seconds() - cpu);
}

static void listen_for_ourselves(void)
{
    socklen_t length = sizeof(self);

    self.sin_family = AF_INET;
    self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&self, sizeof(self)) != 0
        || listen(listener, 64) != 0
        || getsockname(listener, (struct sockaddr *)&self, &length) != 0) {
        die("listener");
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    char line[128];
    const char *mode = argc > 4 ? argv[4] : "";
    double argument = argc > 5 ? atof(argv[5]) : 0;
    long n = argc > 3 ? atol(argv[3]) : 0, i;

    if (n < 1 || n > MAX_CLIENTS || !(strcmp(mode, "burst") == 0 ? argc == 5
            : (strcmp(mode, "ramp") == 0 || strcmp(mode, "loop") == 0) && argument > 0)) {
        fprintf(stderr, "usage: streams SOCKET MESSAGE N burst | ramp RATE | loop SECONDS\n");
        return 2;
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    target.sun_family = AF_UNIX;
    if (strlen(argv[1]) >= sizeof(target.sun_path)) {
        errno = ENAMETOOLONG;
        die(argv[1]);
    }
    strcpy(target.sun_path, argv[1]);
    read_message(argv[2]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    listen_for_ourselves();

    if (strcmp(mode, "loop") == 0) {
        loop(n, argument);
        return 0;
    }
    for (i = 0; i < n && argument == 0; i++) {
        make_pair(&clients[i]);
    }
    open_all(n, argument);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (strncmp(line, "count ", 6) == 0) {
            count(atof(line + 6));
        }
    }
    return 0;
}
