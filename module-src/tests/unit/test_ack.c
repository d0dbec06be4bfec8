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
#include <signal.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>

/* What stands between connecting and sending: who listens, what he answers, and the kernel's limit
 * on descriptors in flight. Where one of them says no, no descriptor may have left. */

#define NOBODY 65534

#define CONNECT_MS 150
#define SEND_MS 100
#define LATEST_MS (CONNECT_MS + SEND_MS + 200)      /* and a busy machine's leave to be late */

#define ACK "\x06"
#define NAK "\x15"

/* A daemon and what it does with each connection. */
typedef struct {
    int listener;
    const char *says;             /* its answer; NULL: silence                                    */
    int late_ms;                  /* it answers so much later                                     */
    int hangs_up;                 /* so many connections first, without a word                    */
    int deaf;                     /* it never accepts                                             */
    int with_fd;                  /* a descriptor comes with the answer                           */
    pthread_t thread;
    int accepted;
    size_t bytes;                 /* that it received, on all connections                         */
    int fds;
} daemon_of;

static void answer(const daemon_of *daemon, int conn)
{
    struct iovec iov = { (void *)(uintptr_t)daemon->says, strlen(daemon->says) };
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr msg;

    memset(&msg, 0, sizeof(msg));
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    if (daemon->with_fd) {
        struct cmsghdr *cmsg;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(cmsg), &daemon->listener, sizeof(int));
    }
    (void)sendmsg(conn, &msg, MSG_NOSIGNAL);
}

static void *serve(void *baton)
{
    daemon_of *daemon = baton;
    int conn;

    while ((conn = accept(daemon->listener, NULL, NULL)) >= 0) {
        char bytes[64];
        int fds[8];
        int count = 0;

        if (++daemon->accepted > daemon->hangs_up) {
            poll(NULL, 0, daemon->late_ms);
            if (daemon->says != NULL) {
                answer(daemon, conn);
            }
            daemon->bytes += receive_all(conn, bytes, sizeof(bytes), fds, &count);
        }
        daemon->fds += count;
        while (count > 0) {
            close(fds[--count]);
        }
        close(conn);
    }
    return NULL;
}

static void start(daemon_of *daemon, int type)
{
    daemon->listener = listen_as(type, 16);
    daemon->accepted = 0;
    daemon->bytes = 0;
    daemon->fds = 0;
    if (!daemon->deaf) {
        pthread_create(&daemon->thread, NULL, serve, daemon);
    }
}

/* Everything that was sent has been received when this returns. */
static void stop(daemon_of *daemon)
{
    shutdown(daemon->listener, SHUT_RDWR);
    if (!daemon->deaf) {
        pthread_join(daemon->thread, NULL);
    }
    close(daemon->listener);
}

static void every_outcome(int client)
{
    static const struct {
        const char *name;
        daemon_of daemon;
        int ack;
        int stranger;             /* the order wants another user                                 */
        handoff_wire_outcome outcome;
        int error;
        int attempts;
        int at_least_ms;
    } cases[] = {
        { "ACK", { .says = ACK }, 1, 0, HANDOFF_WIRE_SENT, 0, 1, 0 },
        { "ACK, not asked for", { .says = ACK }, 0, 0, HANDOFF_WIRE_SENT, 0, 1, 0 },
        { "silence, no ACK asked for", { .says = NULL }, 0, 0, HANDOFF_WIRE_SENT, 0, 1, 0 },
        { "ACK, late and in time", { .says = ACK, .late_ms = 60 }, 1, 0, HANDOFF_WIRE_SENT, 0, 1,
          60 },
        { "ACK with a descriptor of its own", { .says = ACK, .with_fd = 1 }, 1, 0,
          HANDOFF_WIRE_SENT, 0, 1, 0 },
        { "hung up once, then ACK", { .says = ACK, .hangs_up = 1 }, 1, 0, HANDOFF_WIRE_SENT, 0, 2,
          10 },
        { "hung up twice, then ACK", { .says = ACK, .hangs_up = 2 }, 1, 0, HANDOFF_WIRE_SENT, 0, 3,
          30 },
        { "hung up each time", { .says = ACK, .hangs_up = 99 }, 1, 0, HANDOFF_WIRE_NOT_ACKED,
          ECONNRESET, 3, 30 },
        { "NAK", { .says = NAK }, 1, 0, HANDOFF_WIRE_REFUSED, EBUSY, 1, 0 },
        { "NAK, late and in time", { .says = NAK, .late_ms = 60 }, 1, 0, HANDOFF_WIRE_REFUSED,
          EBUSY, 1, 60 },
        { "another byte", { .says = "2" }, 1, 0, HANDOFF_WIRE_NOT_ACKED, EPROTO, 1, 0 },
        { "a greeting that begins with ACK", { .says = ACK "hello" }, 1, 0, HANDOFF_WIRE_NOT_ACKED,
          EPROTO, 1, 0 },
        { "ACK and NAK at once", { .says = ACK NAK }, 1, 0, HANDOFF_WIRE_NOT_ACKED, EPROTO, 1, 0 },
        { "silence", { .says = NULL }, 1, 0, HANDOFF_WIRE_NOT_ACKED, EAGAIN, 1, 245 },
        { "not even accepted", { .deaf = 1 }, 1, 0, HANDOFF_WIRE_NOT_ACKED, EAGAIN, 1, 245 },
        { "ACK, too late", { .says = ACK, .late_ms = 400 }, 1, 0, HANDOFF_WIRE_NOT_ACKED, EAGAIN,
          1, 245 },
        { "a stranger", { .says = ACK }, 0, 1, HANDOFF_WIRE_WRONG_PEER, EPERM, 1, 0 },
        { "a stranger who says ACK", { .says = ACK }, 1, 1, HANDOFF_WIRE_WRONG_PEER, EPERM, 1, 0 },
        { "a stranger who does not accept", { .deaf = 1 }, 1, 1, HANDOFF_WIRE_WRONG_PEER, EPERM, 1,
          0 },
    };
    static const int types[] = { SOCK_SEQPACKET, SOCK_STREAM };
    size_t i;

    for (i = 0; i < 2 * sizeof(cases) / sizeof(cases[0]); i++) {
        size_t at = i / 2;
        const char *kind = i % 2 ? "stream" : "seqpacket";
        daemon_of daemon = cases[at].daemon;
        handoff_wire_order order = order_for(CONNECT_MS, SEND_MS, 2);
        handoff_wire_message message;
        handoff_wire_report report;
        handoff_wire_outcome outcome;
        int sent = cases[at].outcome == HANDOFF_WIRE_SENT;

        start(&daemon, types[i % 2]);
        order.wants_ack = cases[at].ack;
        order.peer_uid = (long long)geteuid() + cases[at].stranger;
        handoff_wire_plain(&message, "hello", 5, client);
        outcome = handoff_wire_deliver(&message, &order, &report);
        stop(&daemon);
        if (!ok(outcome == cases[at].outcome && report.error == cases[at].error
                && report.attempts == cases[at].attempts && opened == report.attempts,
                "%s, %s: its outcome, errno and attempts", cases[at].name, kind)) {
            printf("# outcome %d, errno %d, attempts %d\n", outcome, report.error,
                   report.attempts);
        }
        ok(report.peer_uid == (long long)geteuid(), "%s, %s: says who listens", cases[at].name,
           kind);
        if (sent) {
            ok(daemon.fds == 1 && daemon.bytes == 5, "%s, %s: the client and the message arrive",
               cases[at].name, kind);
        }
        else {
            ok(daemon.fds == 0 && daemon.bytes == 0, "%s, %s: no descriptor and no byte has left",
               cases[at].name, kind);
        }
        if (!ok(report.elapsed_us >= cases[at].at_least_ms * 1000L
                && report.elapsed_us <= LATEST_MS * 1000L, "%s, %s: in its time", cases[at].name,
                kind)) {
            printf("# %ld us\n", report.elapsed_us);
        }
    }
}

static void on_alarm(int number)
{
    (void)number;
}

static void signals_do_not_move_the_deadline(int client)
{
    daemon_of daemon = { .deaf = 1 };
    handoff_wire_order order = order_for(CONNECT_MS, SEND_MS, 2);
    struct itimerval often = { { 0, 3000 }, { 0, 3000 } };
    struct itimerval never = { { 0, 0 }, { 0, 0 } };
    struct sigaction action;
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;

    memset(&action, 0, sizeof(action));
    action.sa_handler = on_alarm;               /* without SA_RESTART */
    sigaction(SIGALRM, &action, NULL);
    start(&daemon, SOCK_SEQPACKET);
    order.wants_ack = 1;
    handoff_wire_plain(&message, "hello", 5, client);
    setitimer(ITIMER_REAL, &often, NULL);
    outcome = handoff_wire_deliver(&message, &order, &report);
    setitimer(ITIMER_REAL, &never, NULL);
    stop(&daemon);
    ok(outcome == HANDOFF_WIRE_NOT_ACKED && report.error == EAGAIN,
       "a signal every 3 ms: still silence, not EINTR");
    ok(report.elapsed_us >= 245000 && report.elapsed_us <= LATEST_MS * 1000L,
       "a signal every 3 ms: still one deadline");
}

static void the_ack_may_take_what_connecting_left(int client)
{
    daemon_of daemon = { .says = ACK, .late_ms = 120 };
    handoff_wire_order order = order_for(30, 400, 0);
    handoff_wire_message message;
    handoff_wire_report report;

    start(&daemon, SOCK_SEQPACKET);
    order.wants_ack = 1;
    handoff_wire_plain(&message, "hello", 5, client);
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT,
       "an ACK after the time for connecting and before the deadline of the whole is in time");
    stop(&daemon);
    ok(daemon.fds == 1, "and the client arrives");
}

static void a_daemon_that_dies_before_the_ack_keeps_nothing(int client)
{
    daemon_of daemon = { .says = ACK };
    handoff_wire_order order = order_for(CONNECT_MS, SEND_MS, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    char byte = 'x';
    int ready[2];
    pid_t pid;

    /* A process of its own listens and dies; nobody else holds its socket. */
    if (pipe(ready) != 0) {
        exit(1);
    }
    pid = fork();
    if (pid == 0) {
        listen_as(SOCK_SEQPACKET, 4);
        if (write(ready[1], &byte, 1) == 1) {
            poll(NULL, 0, 60);
        }
        _exit(0);
    }
    if (read(ready[0], &byte, 1) != 1) {
        exit(1);
    }
    order.wants_ack = 1;
    handoff_wire_plain(&message, "hello", 5, client);
    outcome = handoff_wire_deliver(&message, &order, &report);
    waitpid(pid, NULL, 0);
    close(ready[0]);
    close(ready[1]);
    ok(outcome == HANDOFF_WIRE_CONNECT_FAILED && report.error == ECONNREFUSED
       && report.attempts == 3 && report.elapsed_us >= 60000,
       "a daemon that dies with the connection in its backlog: tried again, nothing lost");

    /* Another daemon takes its place: the same message goes to it. */
    start(&daemon, SOCK_SEQPACKET);
    outcome = handoff_wire_deliver(&message, &order, &report);
    stop(&daemon);
    ok(outcome == HANDOFF_WIRE_SENT && daemon.fds == 1, "and the next daemon gets the client");
}

/* The kernel remembers who called listen(2), not who made the socket or accepts. */
static void the_peer_is_who_listens(int client)
{
    struct sockaddr_un address;
    handoff_wire_order order = order_for(CONNECT_MS, SEND_MS, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    int listener;
    pid_t pid;
    int status = 1;

    if (geteuid() != 0) {
        ok(1, "the peer is who called listen # SKIP not root: cannot become another user");
        return;
    }
    address_of(&address);
    unlink(path);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0) {
        perror("bind");
        exit(1);
    }
    pid = fork();
    if (pid == 0) {
        _exit(setuid(NOBODY) == 0 && listen(listener, 4) == 0 ? 0 : 1);
    }
    waitpid(pid, &status, 0);
    if (!ok(status == 0, "nobody listens on root's socket")) {
        close(listener);
        return;
    }
    handoff_wire_plain(&message, "hello", 5, client);
    order.peer_uid = NOBODY;
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT,
       "an order for nobody is sent");
    order.peer_uid = 0;
    ok(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_WRONG_PEER
       && report.peer_uid == NOBODY && report.attempts == 1,
       "an order for root is not, and says that it is nobody");
    close(listener);
}

/* A user whom root's limits do not exempt, and whom nobody else is: the kernel counts per user, and
 * another run of these tests at the same time would count too. Whether that worked. */
static int become_nobody_else(void)
{
    return geteuid() == 0 && setuid((uid_t)(200000 + getpid())) == 0;
}

enum { OUTCOME, ERROR, ATTEMPTS, ELAPSED, CALLS, ALONE, FACTS };

/* Runs as an ordinary user with few descriptors: sends to a daemon that does not receive until the
 * kernel says stop; tells what happened; and once the daemon received, sends again. */
static void fill_the_kernel(int client, int said, int go)
{
    struct rlimit few = { 40, 40 };
    handoff_wire_order order = order_for(CONNECT_MS, SEND_MS, 2);
    handoff_wire_message message;
    handoff_wire_report report;
    int facts[FACTS] = { 0 };
    char byte;

    facts[ALONE] = become_nobody_else();
    if ((geteuid() == 0 && setuid(NOBODY) != 0) || setrlimit(RLIMIT_NOFILE, &few) != 0) {
        _exit(1);
    }
    handoff_wire_plain(&message, "hello", 5, client);
    do {
        facts[OUTCOME] = (int)handoff_wire_deliver(&message, &order, &report);
        facts[ERROR] = report.error;
        facts[ATTEMPTS] = report.attempts;
        facts[ELAPSED] = (int)report.elapsed_us;
        facts[CALLS]++;
    } while (facts[OUTCOME] == HANDOFF_WIRE_SENT && facts[CALLS] < 100);
    if (write(said, facts, sizeof(facts)) != sizeof(facts) || read(go, &byte, 1) != 1) {
        _exit(1);
    }
    _exit(handoff_wire_deliver(&message, &order, &report) == HANDOFF_WIRE_SENT ? 0 : 2);
}

static void too_many_descriptors_in_flight(int client)
{
    int listener = listen_as(SOCK_SEQPACKET, 128);
    int facts[FACTS] = { -1 };
    int received = 0;
    int said[2];
    int go[2];
    int status = -1;
    pid_t pid;

    *strrchr(path, '/') = '\0';
    chmod(path, 0755);
    path[strlen(path)] = '/';
    chmod(path, 0666);
    if (pipe(said) != 0 || pipe(go) != 0) {
        exit(1);
    }
    pid = fork();
    if (pid == 0) {
        fill_the_kernel(client, said[1], go[0]);
    }
    close(said[1]);
    if (read(said[0], facts, sizeof(facts)) != sizeof(facts)) {
        ok(1, "ETOOMANYREFS # SKIP this user can neither become nobody nor lower its limits");
    }
    else if (facts[OUTCOME] == HANDOFF_WIRE_SENT) {
        ok(1, "ETOOMANYREFS # SKIP 100 descriptors in flight with a limit of 40, and the kernel "
           "did not mind (a sandbox, or a user with CAP_SYS_RESOURCE)");
    }
    else {
        if (!ok(facts[OUTCOME] == HANDOFF_WIRE_SEND_FAILED && facts[ERROR] == ETOOMANYREFS,
                "the kernel says ETOOMANYREFS when a daemon does not receive")) {
            printf("# outcome %d, errno %d\n", facts[OUTCOME], facts[ERROR]);
        }
        ok(facts[CALLS] <= 42 && (facts[CALLS] > 39 || !facts[ALONE]),
           "after as many as the limit allows (%d)%s", facts[CALLS] - 1,
           facts[ALONE] ? "" : ", or fewer: other processes of this user count too");
        ok(facts[ATTEMPTS] == 3 && facts[ELAPSED] >= 30000 && facts[ELAPSED] <= LATEST_MS * 1000,
           "and after two retries in their time");
    }
    /* Only what was sent; the refused attempts are in the backlog, hung up. */
    for (;;) {
        char bytes[16];
        int fds[8];
        int count = 0;
        struct pollfd ready = { listener, POLLIN, 0 };

        if (poll(&ready, 1, 0) != 1) {
            break;
        }
        receive(listener, bytes, sizeof(bytes), fds, &count);
        received += count;
        while (count > 0) {
            close(fds[--count]);
        }
    }
    if (facts[OUTCOME] == HANDOFF_WIRE_SEND_FAILED) {
        ok(received == facts[CALLS] - 1, "the daemon gets what was sent, and none of what was not");
    }
    if (write(go[1], "x", 1) != 1) {
        exit(1);
    }
    waitpid(pid, &status, 0);
    if (facts[OUTCOME] == HANDOFF_WIRE_SEND_FAILED && facts[ALONE]) {
        ok(status == 0, "and once the daemon received, the next one is sent");
    }
    close(said[0]);
    close(go[0]);
    close(go[1]);
    close(listener);
}

int main(void)
{
    static void (*const tests[])(int client) = {
        every_outcome,
        signals_do_not_move_the_deadline,
        the_ack_may_take_what_connecting_left,
        a_daemon_that_dies_before_the_ack_keeps_nothing,
        the_peer_is_who_listens,
        too_many_descriptors_in_flight,
        NULL,
    };

    return run_with_client(tests);
}
