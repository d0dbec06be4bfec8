/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * A closed loop of HTTP clients: each sends a request, reads the whole answer, and begins again.
 *
 * usage: loadgen PORT URI CONNECTIONS SECONDS|REQUESTSx [keep-alive]
 *
 * Ends after so many seconds, or after so many requests ("200x"). Each request has a TCP connection
 * of its own and ends when the server's FIN has arrived; with "keep-alive" the connections stay and
 * a request ends with the last byte that Content-Length announced. A response counts only when it
 * begins with a 200 and ends with the body that everybody here answers; anything else is a failure.
 * A server may close a kept connection whenever it is idle, and the event MPM does when all threads
 * of a process are busy: a request that met the end of such a connection is sent again on a new one
 * (RFC 9112, section 9.3.1), which is counted, and its latency is that of both.
 *
 * Prints one line of JSON: requests, failures by kind, how many kept connections were opened anew,
 * seconds, the generator's own CPU seconds, and latency in microseconds from connect(2) to the end
 * of the response. One thread and one epoll.
 *
 * After the server's FIN the client ends with RST (SO_LINGER 0). A FIN would be more polite, but
 * leaves a TIME_WAIT in the server, and in a connection-tracking firewall an entry for 120 s: at
 * some thousand connections per second its table is full in a minute, and then the kernel drops
 * whatever it likes ("nf_conntrack: table full", seen as clients that wait a second and more).
 * Source addresses rotate through 127.0.1.x, so that there are enough pairs of addresses; the
 * kernel chooses the port at connect(2) (IP_BIND_ADDRESS_NO_PORT).
 */

#define _GNU_SOURCE 1

#include "answer.h"
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

#define MAX_CONNECTIONS 4096
#define MAX_RESPONSE 4096
#define SOURCES 200
#define PATIENCE 20                     /* seconds in which nothing comes, one by one */

typedef struct {
    int fd;
    int sent;
    int kept;                           /* fd has brought an answer before */
    size_t have;
    int64_t began;
    char response[MAX_RESPONSE];
} client;

static client clients[MAX_CONNECTIONS];
static char request[1024];
static size_t request_length;
static struct sockaddr_in server;
static int epoll_fd, keep_alive;

static uint32_t *latencies;             /* nanoseconds; 4.2 s and more are cut to that */
static size_t latency_count, latency_room;
static unsigned long failed_connect, failed_cut, failed_content, failed_late, reopened;
static size_t response_bytes;

static void record(int64_t ns)
{
    if (latency_count == latency_room) {
        latency_room = latency_room != 0 ? latency_room * 2 : 65536;
        latencies = realloc(latencies, latency_room * sizeof(*latencies));
        if (latencies == NULL) {
            die("realloc");
        }
    }
    latencies[latency_count++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

/* On the loopback the handshake is over when connect(2) returns, so this nearly always succeeds at
 * once; where it does not, EPOLLOUT says when. */
static void try_send(client *c)
{
    if (send(c->fd, request, request_length, MSG_NOSIGNAL | MSG_DONTWAIT)
        == (ssize_t)request_length) {
        c->sent = 1;
    }
}

static int open_connection(client *c)
{
    static unsigned int turn;
    struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c };
    struct sockaddr_in source = { .sin_family = AF_INET };
    struct linger reset = { .l_onoff = 1, .l_linger = 0 };
    int on = 1;

    c->sent = 0;
    c->kept = 0;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        die("socket");
    }
    source.sin_addr.s_addr = htonl(0x7f000101u + turn++ % SOURCES);
    (void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    (void)setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
    if (bind(c->fd, (struct sockaddr *)&source, sizeof(source)) != 0) {
        die("bind");
    }
    if (connect(c->fd, (struct sockaddr *)&server, sizeof(server)) != 0 && errno != EINPROGRESS) {
        failed_connect++;
        close(c->fd);
        c->fd = -1;
        return 0;
    }
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) {
        die("epoll_ctl");
    }
    try_send(c);
    return 1;
}

static int reopen(client *c)
{
    close(c->fd);
    c->fd = -1;
    reopened++;
    return open_connection(c);
}

static int begin(client *c)
{
    c->have = 0;
    c->began = now_ns();
    if (c->fd < 0) {
        return open_connection(c);
    }
    c->sent = 0;
    c->kept = 1;
    try_send(c);
    return c->sent || reopen(c);
}

/* Whether these bytes are a whole 200 with the body that is expected. */
static int is_right(const client *c)
{
    const size_t body = sizeof(ANSWER_BODY) - 1;

    return c->have > body && memcmp(c->response, "HTTP/1.1 200 ", 13) == 0
           && memcmp(c->response + c->have - body, ANSWER_BODY, body) == 0;
}

/* With keep-alive: whether the response is complete, which its Content-Length says. */
static int is_whole(client *c)
{
    const char *end, *length;

    c->response[c->have] = '\0';
    end = strstr(c->response, "\r\n\r\n");
    length = strcasestr(c->response, "\r\nContent-Length:");
    return end != NULL && length != NULL && length < end
           && c->have >= (size_t)(end + 4 - c->response) + strtoul(length + 17, NULL, 10);
}

typedef enum { WAITING, OVER } progress;

static progress finish(client *c, int right)
{
    if (right) {
        record(now_ns() - c->began);
        response_bytes = c->have;
    }
    if (!right || !keep_alive) {
        close(c->fd);
        c->fd = -1;
    }
    return OVER;
}

/* The end of a connection, which errno or 0 bytes told of. */
static progress on_end(client *c, int right)
{
    if (!right && c->kept && c->have == 0) {
        return reopen(c) ? WAITING : OVER;
    }
    if (!right) {
        *(c->have > 0 ? &failed_content : &failed_cut) += 1;
    }
    return finish(c, right);
}

static progress on_event(client *c)
{
    if (!c->sent) {
        try_send(c);
    }
    for (;;) {
        ssize_t n = recv(c->fd, c->response + c->have, sizeof(c->response) - 1 - c->have, 0);

        if (n > 0) {
            c->have += (size_t)n;
            if (keep_alive && is_whole(c)) {
                int right = is_right(c);

                failed_content += !right;
                return finish(c, right);
            }
            if (c->have == sizeof(c->response) - 1) {
                failed_content++;
                return finish(c, 0);
            }
        }
        else if (n == 0) {
            return on_end(c, !keep_alive && is_right(c));
        }
        else if (errno == EAGAIN) {
            return WAITING;
        }
        else {
            return on_end(c, 0);
        }
    }
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static double percentile_us(double share)
{
    size_t at = (size_t)(share * (double)latency_count);

    if (latency_count == 0) {
        return 0;
    }
    return latencies[at < latency_count ? at : latency_count - 1] / 1000.0;
}

int main(int argc, char **argv)
{
    struct epoll_event events[256];
    struct rusage used;
    long connections, limit = 0, begun = 0, running = 0;
    int quiet = 0;
    int64_t start, stop = INT64_MAX, finished;
    double cpu, mean = 0;
    size_t i;
    char *unit;

    if (argc < 5 || (argc == 6 && strcmp(argv[5], "keep-alive") != 0) || argc > 6) {
        fprintf(stderr, "usage: loadgen PORT URI CONNECTIONS SECONDS|REQUESTSx [keep-alive]\n");
        return 2;
    }
    keep_alive = argc == 6;
    connections = atol(argv[3]);
    if (connections < 1 || connections > MAX_CONNECTIONS) {
        fprintf(stderr, "CONNECTIONS is 1 to %d\n", MAX_CONNECTIONS);
        return 2;
    }
    request_length = (size_t)snprintf(request, sizeof(request), "GET %s HTTP/1.1\r\n"
                                      "Host: localhost\r\nUser-Agent: loadgen\r\nAccept: */*\r\n"
                                      "%s\r\n", argv[2],
                                      keep_alive ? "" : "Connection: close\r\n");
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(argv[1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);

    start = now_ns();
    cpu = strtod(argv[4], &unit);
    if (*unit == 'x') {
        limit = (long)cpu;
    }
    else {
        stop = start + (int64_t)(cpu * 1e9);
    }
    for (i = 0; i < (size_t)connections; i++) {
        clients[i].fd = -1;
        if ((limit == 0 || begun < limit) && begin(&clients[i])) {
            begun++;
            running++;
        }
    }
    finished = start;
    while (running > 0 && quiet < PATIENCE) {
        int n = epoll_wait(epoll_fd, events, sizeof(events) / sizeof(events[0]), 1000);
        int64_t now = now_ns();
        int e;

        if (n < 0 && errno != EINTR) {
            die("epoll_wait");
        }
        for (e = 0; e < n; e++) {
            client *c = events[e].data.ptr;

            if (c->fd < 0 || on_event(c) == WAITING) {
                continue;
            }
            running--;
            if ((limit > 0 ? begun < limit : now < stop) && begin(c)) {
                begun++;
                running++;
            }
        }
        /* Counted, and not measured: a machine that was suspended for a minute is not late. */
        quiet = n == 0 ? quiet + 1 : 0;
        if (n > 0) {
            finished = now_ns();
        }
    }
    failed_late += (unsigned long)running;
    if (limit > 0 && begun < limit) {
        failed_late += (unsigned long)(limit - begun);
    }

    getrusage(RUSAGE_SELF, &used);
    cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
          + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    qsort(latencies, latency_count, sizeof(*latencies), by_value);
    for (i = 0; i < latency_count; i++) {
        mean += latencies[i] / 1000.0 / (double)latency_count;
    }
    printf("{\"requests\": %zu, \"failures\": {\"connect\": %lu, \"cut\": %lu, \"content\": %lu, "
           "\"late\": %lu}, \"reopened\": %lu, \"response_bytes\": %zu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, "
           "\"latency_us\": {\"mean\": %.1f, \"p50\": %.1f, \"p99\": %.1f, \"max\": %.1f}}\n",
           latency_count, failed_connect, failed_cut, failed_content, failed_late, reopened, response_bytes,
           (double)(finished - start) / SECOND, cpu, mean, percentile_us(0.5), percentile_us(0.99),
           percentile_us(1));
    return 0;
}
