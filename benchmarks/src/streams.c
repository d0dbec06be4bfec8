/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Opens streams and is the clients: through a web server, or handed to a streaming daemon as Apache
 * would hand them over.
 *
 * usage: streams TARGET MESSAGE N burst | ramp RATE | loop SECONDS | steps
 *
 *   burst          N connections are made first, then all are handed over as fast as they are taken
 *   ramp RATE      RATE handoffs per second, N in all, each with its connection
 *   loop SECONDS   N at a time; whenever an answer is complete another one begins
 *   steps          none at first and N at most; standard input says how many
 *
 * TARGET is the path of a SOCK_SEQPACKET socket, or tcp:PORT, a web server on 127.0.0.1 (steps only).
 * The file MESSAGE is what is sent with each client, or each client's request; every "@@@@@@@@" in
 * it becomes the client's number in eight hexadecimal digits, so that everybody has an id, a user
 * and an address of his own.
 *
 * Prints a line of JSON when every client has its first event (loop: when it is over; steps: none).
 * But for loop the streams stay, and standard input says what next; each line is answered by one:
 *
 *   count SECONDS [INTERVAL_MS]    counts events; with the interval at which each stream sends them
 *                                  also how much later they come than the first one promised
 *   grow TOTAL RATE PATIENCE       opens more until there were TOTAL, and waits for first events, but
 *                                  no longer than PATIENCE seconds after the last was opened
 *   finish SECONDS                 waits so long for the streams to come to their ends
 *
 * End of file ends. Latency is from connect(2), to the daemon's socket or to the web server, to the
 * first byte of "data: " in the client's hands. Failures: handoff (nobody took it; refused or ended
 * before anything came), status (not a 200), cut (ended without [DONE]), late (nothing came for
 * twenty seconds). With steps they are for the caller to judge: "live" are there and have begun,
 * "waiting" are there and have not.
 *
 * All connections of the generator end with RST (SO_LINGER 0): no TIME_WAIT, and no entries that
 * fill the table of a connection-tracking firewall; loadgen.c says more. One thread and one epoll.
 */

#define _GNU_SOURCE 1

#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
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

typedef struct {
    int fd, other;                /* ours, and the end that the daemon gets; -1: none             */
    int matched;                  /* of MARK, at the end of what has come                         */
    int began_reading, first;     /* the head's first bytes are here; so is the first event       */
    int to_send;                  /* the request is not on its way yet                            */
    int64_t began;                /* 0: the handoff was not tried yet                             */
    int64_t first_at;
    unsigned have, seen;          /* bytes in tail; events after the first                        */
    unsigned counted_in;          /* the look whose `events` have the last event                  */
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

typedef struct {
    uint32_t *values;                   /* microseconds */
    size_t count, room;
} series;

static series latencies, latenesses;
static int64_t interval;                /* nanoseconds between a stream's events; 0: lateness is not looked at */
static int front_door;                  /* the target is a web server */
static struct sockaddr_in door;
static long opened;                     /* of `clients`, by steps */
static unsigned long long events, bytes, reads;
static unsigned look = 1;               /* how often `events` began anew */
static unsigned long handed, firsts, completed, retries;
static unsigned long failed_handoff, failed_status, failed_cut, failed_late;
static int64_t last_first;

static void record(series *s, int64_t ns)
{
    if (s->count == s->room) {
        s->room = s->room != 0 ? s->room * 2 : 65536;
        s->values = realloc(s->values, s->room * sizeof(*s->values));
        if (s->values == NULL) {
            die("realloc");
        }
    }
    s->values[s->count++] = (uint32_t)(ns / 1000);
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

static void put_number_of(char *text, unsigned value)
{
    char digits[9];
    char *at = text;

    snprintf(digits, sizeof(digits), "%08x", value);
    while ((at = strstr(at, "@@@@@@@@")) != NULL) {
        memcpy(at, digits, 8);
    }
}

/* A socket from an address of its own; `more` is for socket(2). */
static void make_socket(client *c, int more)
{
    struct sockaddr_in source = { .sin_family = AF_INET };
    struct linger reset = { .l_onoff = 1, .l_linger = 0 };
    int on = 1;

    memset(c, 0, sizeof(*c));
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | more, 0);
    if (c->fd < 0) {
        die("socket");
    }
    source.sin_addr.s_addr = htonl(0x7f000101u + number % SOURCES);
    (void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    (void)setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
    if (bind(c->fd, (struct sockaddr *)&source, sizeof(source)) != 0) {
        die("bind");
    }
}

/* A TCP connection whose both ends are ours. */
static void make_pair(client *c)
{
    struct sockaddr_in source, peer;
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
    socklen_t length = sizeof(source);

    make_socket(c, 0);
    if (connect(c->fd, (struct sockaddr *)&self, sizeof(self)) != 0) {
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
    put_number_of(text, number++);
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

/* A client's request, once its connection is there. */
static void ask(client *c)
{
    static char text[MAX_MESSAGE];
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };

    memcpy(text, message, message_length + 1);
    put_number_of(text, (unsigned)(c - clients));
    if (send(c->fd, text, message_length, MSG_NOSIGNAL) == (ssize_t)message_length) {
        c->to_send = 0;
        handed++;
        (void)epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    }
}

/* What a browser does. */
static void knock(client *c)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLOUT, .data.ptr = c };

    make_socket(c, SOCK_NONBLOCK);
    number++;
    c->other = -1;
    c->to_send = 1;
    c->began = now_ns();
    if (connect(c->fd, (struct sockaddr *)&door, sizeof(door)) != 0 && errno != EINPROGRESS) {
        failed_handoff++;
        end_client(c);
        return;
    }
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) {
        die("client");
    }
    ask(c);
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
            c->counted_in = look;
            if (!c->first) {
                c->first = 1;
                firsts++;
                c->first_at = last_first = now_ns();
                record(&latencies, last_first - c->began);
            }
            else if (interval > 0) {
                int64_t late = now_ns() - c->first_at - (int64_t)++c->seen * interval;

                record(&latenesses, late > 0 ? late : 0);
            }
            else {
                c->seen++;
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
        /* The mark of the end is no event; one that came before this look is in no number of its. */
        if (c->counted_in == look) {
            events--;
        }
    }
    else if (front_door && !c->began_reading) {
        failed_handoff++;
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

        if (c->fd >= 0 && c->to_send && (ready[i].events & EPOLLOUT)) {
            ask(c);
        }
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

static double percentile_ms(const series *s, double share)
{
    size_t at = (size_t)(share * (double)s->count);

    if (s->count == 0) {
        return 0;
    }
    return s->values[at < s->count ? at : s->count - 1] / 1000.0;
}

static void print_series(const char *name, const series *s)
{
    if (s->count > 0) {
        qsort(s->values, s->count, sizeof(*s->values), by_value);
    }
    printf(", \"%s\": {\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f}", name, percentile_ms(s, 0.5),
           percentile_ms(s, 0.99), percentile_ms(s, 1));
}

static double cpu_seconds(void)
{
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
           + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* "due" are the events of live streams since their first that should be here, but for those of the
 * last quarter of an interval, and "behind" those of them that are not. */
static void report(double seconds, double cpu, int64_t each)
{
    unsigned long live = 0, waiting = 0, due = 0, behind = 0;
    int64_t now = now_ns();
    long i;

    for (i = 0; i < opened; i++) {
        live += clients[i].fd >= 0 && clients[i].first;
        waiting += clients[i].fd >= 0 && !clients[i].first;
        if (each > 0 && clients[i].fd >= 0 && clients[i].first) {
            int64_t age = now - clients[i].first_at - each / 4;
            unsigned long expected = age > 0 ? (unsigned long)(age / each) : 0;

            due += expected;
            behind += expected > clients[i].seen ? expected - clients[i].seen : 0;
        }
    }
    printf("{\"handoffs\": %lu, \"first_events\": %lu, \"completed\": %lu, \"events\": %llu, "
           "\"reads\": %llu, \"bytes\": %llu, \"retries\": %lu, \"failures\": {\"handoff\": %lu, "
           "\"status\": %lu, \"cut\": %lu, \"late\": %lu}, \"streams\": %ld, \"live\": %lu, "
           "\"waiting\": %lu, \"due\": %lu, \"behind\": %lu, \"seconds\": %.6f, \"cpu_seconds\": %.6f",
           handed, firsts, completed, events, reads, bytes, retries, failed_handoff, failed_status,
           failed_cut, failed_late, opened, live, waiting, due, behind, seconds, cpu);
    print_series("first_event_ms", &latencies);
    print_series("lateness_ms", &latenesses);
    printf("}\n");
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
           cpu_seconds() - cpu, 0);
}

static void count(double seconds, double interval_ms)
{
    int64_t start = now_ns(), stop = start + (int64_t)(seconds * SECOND);
    double cpu = cpu_seconds();
    int quiet = 0;

    events = bytes = reads = 0;
    look++;
    latenesses.count = 0;
    interval = (int64_t)(interval_ms * 1e6);
    while (now_ns() < stop) {
        (void)turn(10, &quiet);
    }
    interval = 0;
    report((double)(now_ns() - start) / SECOND, cpu_seconds() - cpu,
           (int64_t)(interval_ms * 1e6));
}

/* Of those that were opened. */
static long ended_or_begun(void)
{
    return (long)(firsts + failed_handoff + failed_status + failed_cut);
}

static void grow(long total, double rate, double patience)
{
    int64_t start = now_ns(), last = start;
    double cpu = cpu_seconds();
    long before = opened;
    int quiet = 0;

    latencies.count = 0;
    last_first = 0;
    while (opened < total || (ended_or_begun() < opened
                              && now_ns() < last + (int64_t)(patience * SECOND))) {
        long due = before + (long)((double)(now_ns() - start) / SECOND * rate) + 1, batch = 0;
        int full = 0;

        due = due < total ? due : total;
        while (opened < due && batch++ < AT_ONCE && !full) {
            client *c = &clients[opened];

            if (front_door) {
                knock(c);
            }
            else {
                if (c->began == 0) {
                    make_pair(c);
                }
                full = !hand_over(c);
            }
            opened += !full;
            last = now_ns();
        }
        (void)turn(opened < due && !full ? 0 : opened < total ? 1 : 20, &quiet);
    }
    report((double)((last_first != 0 ? last_first : now_ns()) - start) / SECOND,
           cpu_seconds() - cpu, 0);
}

static void finish(double seconds)
{
    int64_t start = now_ns(), stop = start + (int64_t)(seconds * SECOND);
    double cpu = cpu_seconds();
    int quiet = 0;

    while ((long)(completed + failed_handoff + failed_status + failed_cut) < opened
           && now_ns() < stop) {
        (void)turn(20, &quiet);
    }
    report((double)(now_ns() - start) / SECOND, cpu_seconds() - cpu, 0);
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
    report((double)(now_ns() - start) / SECOND, cpu_seconds() - cpu, 0);
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

/* Where the streams come from; a web server's address begins with "tcp:". */
static void aim_at(const char *where)
{
    if (strncmp(where, "tcp:", 4) == 0) {
        front_door = 1;
        door.sin_family = AF_INET;
        door.sin_port = htons((uint16_t)atoi(where + 4));
        door.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return;
    }
    target.sun_family = AF_UNIX;
    if (strlen(where) >= sizeof(target.sun_path)) {
        errno = ENAMETOOLONG;
        die(where);
    }
    strcpy(target.sun_path, where);
}

static void obey(const char *line, long most)
{
    double a = 0, b = 0, c = 0;

    if (sscanf(line, "count %lf %lf", &a, &b) >= 1) {
        count(a, b);
    }
    else if (sscanf(line, "grow %lf %lf %lf", &a, &b, &c) == 3 && a <= (double)most && b > 0) {
        grow((long)a, b, c);
    }
    else if (sscanf(line, "finish %lf", &a) == 1) {
        finish(a);
    }
    else {
        fprintf(stderr, "not understood, or more than %ld streams: %s", most, line);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    char line[128];
    const char *mode = argc > 4 ? argv[4] : "";
    double argument = argc > 5 ? atof(argv[5]) : 0;
    long n = argc > 3 ? atol(argv[3]) : 0, i;
    int steps = strcmp(mode, "steps") == 0;

    if (n < 1 || n > MAX_CLIENTS || !(steps || strcmp(mode, "burst") == 0 ? argc == 5
            : (strcmp(mode, "ramp") == 0 || strcmp(mode, "loop") == 0) && argument > 0)
        || (!steps && strncmp(argv[1], "tcp:", 4) == 0)) {
        fprintf(stderr, "usage: streams TARGET MESSAGE N burst | ramp RATE | loop SECONDS | steps "
                        "(N at most %d; tcp:PORT with steps only)\n", MAX_CLIENTS);
        return 2;
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    aim_at(argv[1]);
    read_message(argv[2]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    listen_for_ourselves();

    if (strcmp(mode, "loop") == 0) {
        loop(n, argument);
        return 0;
    }
    for (i = 0; i < n && argument == 0 && !steps; i++) {
        make_pair(&clients[i]);
    }
    if (!steps) {
        open_all(n, argument);
        opened = n;
    }
    while (fgets(line, sizeof(line), stdin) != NULL) {
        obey(line, n);
    }
    return 0;
}
