/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Asks for a page again and again, whether or not it comes: the visitor who wants no stream.
 *
 * usage: prober PORT REQUEST RATE PATIENCE
 *
 * The file REQUEST is sent to 127.0.0.1:PORT RATE times per second, each time on a connection of its
 * own and at its own moment (an open loop: a server that has stopped is asked as often as one that
 * answers). Nobody asks in step with anything: each moment is moved by up to half an interval. An
 * answer is right when it is a 200 and ends with "</html>\n" and the server's FIN; one that is not
 * there after PATIENCE seconds is late.
 *
 * Standard input says when: "count SECONDS" asks for so long, waits for the last answer and prints
 * a line of JSON: how many were asked, right, wrong and late, the prober's CPU seconds, and latency
 * in milliseconds from connect(2) to the end of the answer, where a missing one counts as PATIENCE.
 * End of file ends. One thread and one epoll; connections end with RST, loadgen.c says why.
 */

#define _GNU_SOURCE 1

#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_CLIENTS 8192
#define MAX_REQUEST 4096
#define SOURCES 200

typedef struct {
    int fd;                             /* 0: free */
    int sent;
    int64_t began;
    size_t have;
    char head[16], tail[16];
} client;

static const char END[] = "</html>\n";
static client clients[MAX_CLIENTS];
static char request[MAX_REQUEST];
static size_t request_length;
static struct sockaddr_in server;
static int epoll_fd;
static int64_t patience;

static double *latencies;               /* milliseconds */
static size_t asked, room, settled, right_ones, wrong, late;

static void settle(client *c, size_t *kind)
{
    double ms = (double)(kind == &right_ones ? now_ns() - c->began : patience) / 1e6;

    if (settled == room) {
        room = room != 0 ? room * 2 : 4096;
        latencies = realloc(latencies, room * sizeof(*latencies));
        if (latencies == NULL) {
            die("realloc");
        }
    }
    latencies[settled++] = ms;
    *kind += 1;
    close(c->fd);
    c->fd = 0;
}

static void try_send(client *c)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };

    if (send(c->fd, request, request_length, MSG_NOSIGNAL) == (ssize_t)request_length) {
        c->sent = 1;
        (void)epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    }
}

static void begin(void)
{
    static unsigned turn;
    struct sockaddr_in source = { .sin_family = AF_INET };
    struct linger reset = { .l_onoff = 1, .l_linger = 0 };
    struct epoll_event event = { .events = EPOLLIN | EPOLLOUT };
    int on = 1, i;
    client *c = NULL;

    for (i = 0; i < MAX_CLIENTS && c == NULL; i++) {
        c = clients[i].fd == 0 ? &clients[i] : NULL;
    }
    if (c == NULL) {
        fprintf(stderr, "more than %d pages at a time: a lower RATE or PATIENCE\n", MAX_CLIENTS);
        exit(1);
    }
    memset(c, 0, sizeof(*c));
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        die("socket");
    }
    source.sin_addr.s_addr = htonl(0x7f000301u + turn++ % SOURCES);
    (void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    (void)setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
    c->began = now_ns();
    event.data.ptr = c;
    asked++;
    if (bind(c->fd, (struct sockaddr *)&source, sizeof(source)) != 0
        || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) {
        die("bind");
    }
    if (connect(c->fd, (struct sockaddr *)&server, sizeof(server)) != 0 && errno != EINPROGRESS) {
        settle(c, &wrong);
        return;
    }
    try_send(c);
}

/* Keeps the first and the last bytes: they say whether an answer is whole. */
static void take(client *c, const char *bytes, size_t length)
{
    size_t i;

    for (i = 0; i < length && c->have + i < sizeof(c->head); i++) {
        c->head[c->have + i] = bytes[i];
    }
    if (length >= sizeof(c->tail)) {
        memcpy(c->tail, bytes + length - sizeof(c->tail), sizeof(c->tail));
    }
    else {
        memmove(c->tail, c->tail + length, sizeof(c->tail) - length);
        memcpy(c->tail + sizeof(c->tail) - length, bytes, length);
    }
    c->have += length;
}

/* Servers that send chunks send the last one behind the page. */
static int is_whole(const client *c)
{
    return memcmp(c->head, "HTTP/1.1 200 ", 13) == 0
           && memmem(c->tail, sizeof(c->tail), END, sizeof(END) - 1) != NULL;
}

static void on_event(client *c)
{
    static char buffer[65536];

    if (!c->sent) {
        try_send(c);
    }
    for (;;) {
        ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

        if (n > 0) {
            take(c, buffer, (size_t)n);
        }
        else if (n < 0 && errno == EAGAIN) {
            return;
        }
        else {
            settle(c, n == 0 && is_whole(c) ? &right_ones : &wrong);
            return;
        }
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double percentile(double share)
{
    size_t at = (size_t)(share * (double)settled);

    return settled == 0 ? 0 : latencies[at < settled ? at : settled - 1];
}

static double cpu_seconds(void)
{
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
           + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void give_up(int64_t now)
{
    int i;

    for (i = 0; i < MAX_CLIENTS; i++) {
        if (clients[i].fd != 0 && now - clients[i].began > patience) {
            settle(&clients[i], &late);
        }
    }
}

static void count(double seconds, double rate)
{
    struct epoll_event ready[64];
    double cpu = cpu_seconds();
    int64_t start = now_ns(), gap = (int64_t)(SECOND / rate), next, swept = start;
    int64_t stop = start + (int64_t)(seconds * SECOND);
    long k = 0;

    asked = settled = right_ones = wrong = late = 0;
    next = start;
    while (next < stop || settled < asked) {
        int64_t now = now_ns();
        int wait = 5, n, i;

        while (next < stop && next <= now) {
            begin();
            next = start + ++k * gap + (int64_t)(drand48() * (double)gap);
        }
        if (next < stop && next - now < 5 * SECOND / 1000) {
            wait = (int)((next - now) * 1000 / SECOND);
        }
        n = epoll_wait(epoll_fd, ready, 64, wait > 0 ? wait : 1);
        for (i = 0; i < n; i++) {
            client *c = ready[i].data.ptr;

            if (c->fd != 0) {
                on_event(c);
            }
        }
        if (now - swept > SECOND / 50) {
            swept = now;
            give_up(now);
        }
    }
    if (settled > 0) {
        qsort(latencies, settled, sizeof(*latencies), by_value);
    }
    printf("{\"asked\": %zu, \"right\": %zu, \"wrong\": %zu, \"late\": %zu, \"cpu_seconds\": %.6f, "
           "\"seconds\": %.6f, \"latency_ms\": {\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f}}\n",
           asked, right_ones, wrong, late, cpu_seconds() - cpu, (double)(now_ns() - start) / SECOND,
           percentile(0.5), percentile(0.99), percentile(1));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    char line[128];
    double rate = argc == 5 ? atof(argv[3]) : 0, seconds;
    FILE *file = argc == 5 ? fopen(argv[2], "rb") : NULL;

    if (rate <= 0 || atof(argv[4]) <= 0 || file == NULL) {
        fprintf(stderr, "usage: prober PORT REQUEST RATE PATIENCE   (see the top of prober.c)\n");
        return 2;
    }
    request_length = fread(request, 1, sizeof(request), file);
    fclose(file);
    patience = (int64_t)(atof(argv[4]) * SECOND);
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(argv[1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        if (sscanf(line, "count %lf", &seconds) != 1) {
            fprintf(stderr, "not understood: %s", line);
            return 2;
        }
        count(seconds, rate);
    }
    return 0;
}
