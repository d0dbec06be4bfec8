/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * Stands in for an OpenAI-compatible server: answers every POST with a stream of chat completion
 * chunks, about 230 bytes each, one write each, over HTTP/1.1 on connections that stay open.
 *
 * usage: llm PORT [CERTIFICATE KEY]
 *
 * Listens on 127.0.0.1, with TLS where it is given the two PEM files and was built WITH_TLS. The
 * model's name says what is wanted: "20x400" is 400 tokens at 20 per second. Prints "ready" when it
 * listens; on SIGUSR1 a line of JSON: connections and requests so far; ends on SIGTERM.
 *
 * One thread, one epoll, one look at all answers per millisecond. A client that reads too slowly for
 * a socket buffer is cut off: here that is a mistake of the measurement.
 */

#define _GNU_SOURCE 1

#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#else
typedef struct ssl_st SSL;
#endif

#define BACKLOG 4096
#define MAX_FD 65536
#define MAX_REQUEST 8192
#define SWEEP (SECOND / 1000)

#define HEAD \
    "HTTP/1.1 200 OK\r\n" \
    "Content-Type: text/event-stream; charset=utf-8\r\n" \
    "Transfer-Encoding: chunked\r\n" \
    "\r\n"
#define BEFORE \
    "data: {\"id\":\"chatcmpl-000000000000000000000000000000\"," \
    "\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"stand-in\"," \
    "\"system_fingerprint\":\"fp_0000000000\",\"choices\":[{\"index\":0,\"delta\":"
#define TOKEN BEFORE "{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n"
#define STOP BEFORE "{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n"
#define DONE "data: [DONE]\n\n"

typedef struct {
    SSL *tls;
    unsigned have;
    long left;                    /* tokens of the answer; -1: none is being written              */
    double pace;
    int64_t due;
    char request[MAX_REQUEST + 1];
} connection;

static connection *connections[MAX_FD];
static int epoll_fd, highest;
static unsigned long accepted, requests;
static char token[1024];
static size_t token_length;

#ifdef WITH_TLS
static SSL_CTX *tls;

static void set_up_tls(const char *certificate, const char *key)
{
    tls = SSL_CTX_new(TLS_server_method());
    if (tls == NULL || SSL_CTX_use_certificate_chain_file(tls, certificate) != 1
        || SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1) {
        ERR_print_errors_fp(stderr);
        exit(1);
    }
    SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
}

static ssize_t with_errno(SSL *s, int n)
{
    int error;

    if (n > 0) {
        return n;
    }
    error = SSL_get_error(s, n);
    ERR_clear_error();
    if (error == SSL_ERROR_ZERO_RETURN) {
        return 0;
    }
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : ECONNRESET;
    return -1;
}

static void greet(connection *c, int fd)
{
    if (tls != NULL) {
        c->tls = SSL_new(tls);
        SSL_set_fd(c->tls, fd);
        SSL_set_accept_state(c->tls);
    }
}

static ssize_t get(connection *c, int fd, char *bytes, size_t length)
{
    return c->tls != NULL ? with_errno(c->tls, SSL_read(c->tls, bytes, (int)length))
                          : recv(fd, bytes, length, MSG_DONTWAIT);
}

static ssize_t put(connection *c, int fd, const char *bytes, size_t length)
{
    return c->tls != NULL ? with_errno(c->tls, SSL_write(c->tls, bytes, (int)length))
                          : send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void forget(connection *c)
{
    SSL_free(c->tls);
}
#else
static void set_up_tls(const char *certificate, const char *key)
{
    fprintf(stderr, "built without TLS (libssl-dev): %s and %s are of no use\n", certificate, key);
    exit(3);
}

static void greet(connection *c, int fd)
{
    (void)c;
    (void)fd;
}

static ssize_t get(connection *c, int fd, char *bytes, size_t length)
{
    (void)c;
    return recv(fd, bytes, length, MSG_DONTWAIT);
}

static ssize_t put(connection *c, int fd, const char *bytes, size_t length)
{
    (void)c;
    return send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void forget(connection *c)
{
    (void)c;
}
#endif

static void drop(int fd)
{
    connection *c = connections[fd];

    connections[fd] = NULL;
    forget(c);
    free(c);
    close(fd);
}

static int send_all(int fd, const char *bytes, size_t length)
{
    if (put(connections[fd], fd, bytes, length) == (ssize_t)length) {
        return 1;
    }
    drop(fd);
    return 0;
}

/* What is due of the answer; all that ends it goes in one piece, as servers do. */
static void go_on(int fd, int64_t now)
{
    static char end[2048];
    connection *c = connections[fd];

    while (c->left > 0 && c->due <= now) {
        if (!send_all(fd, token, token_length)) {
            return;
        }
        c->left--;
        c->due += (int64_t)(SECOND / c->pace);
    }
    if (c->left == 0 && c->due <= now) {
        int n = snprintf(end, sizeof(end), "%zx\r\n%s\r\n%zx\r\n%s\r\n0\r\n\r\n", sizeof(STOP) - 1,
                         STOP, sizeof(DONE) - 1, DONE);

        c->left = -1;
        (void)send_all(fd, end, (size_t)n);
    }
}

/* A whole request: begin its answer. Returns 0 where more of it has to come. */
static int answer(int fd, int64_t now)
{
    connection *c = connections[fd];
    const char *body, *at;
    size_t length;

    c->request[c->have] = '\0';
    body = strstr(c->request, "\r\n\r\n");
    at = strcasestr(c->request, "\r\ncontent-length:");
    if (body == NULL || at == NULL) {
        return 0;
    }
    length = strtoul(at + 17, NULL, 10);
    if (c->have < (size_t)(body + 4 - c->request) + length) {
        return 0;
    }
    requests++;
    c->have = 0;
    at = strstr(body, "\"model\"");
    at = at != NULL ? at + 7 + strspn(at + 7, " :\"") : "1x1";
    c->pace = atof(at);
    at = strchr(at, 'x');
    c->left = at != NULL ? atol(at + 1) : 1;
    c->pace = c->pace > 0 ? c->pace : 1;
    c->due = now;
    if (send_all(fd, HEAD, sizeof(HEAD) - 1)) {
        go_on(fd, now);
    }
    return 1;
}

static void on_readable(int fd, int64_t now)
{
    connection *c = connections[fd];
    ssize_t n;

    do {
        n = get(c, fd, c->request + c->have, MAX_REQUEST - c->have);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            drop(fd);
            return;
        }
        c->have += n > 0 ? (unsigned)n : 0;
    } while (n > 0 && c->left < 0 && !answer(fd, now) && c->have < MAX_REQUEST);
}

static void on_listener(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
    struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP, .data.fd = fd };

    if (fd < 0) {
        if (errno != EAGAIN && errno != ECONNABORTED) {
            die("accept");
        }
        return;
    }
    connections[fd] = calloc(1, sizeof(connection));
    if (connections[fd] == NULL || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        die("connection");
    }
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    connections[fd]->left = -1;
    highest = fd > highest ? fd : highest;
    accepted++;
    greet(connections[fd], fd);
}

static int watch_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC);
}

static void on_signal(int fd)
{
    struct signalfd_siginfo info;

    if (read(fd, &info, sizeof(info)) != sizeof(info) || info.ssi_signo != SIGUSR1) {
        exit(0);
    }
    printf("{\"connections\": %lu, \"requests\": %lu}\n", accepted, requests);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct epoll_event ready[256], event = { .events = EPOLLIN };
    struct sockaddr_in address = { .sin_family = AF_INET };
    struct rlimit files;
    int64_t swept = 0;
    int listener, signals, on = 1;

    if (argc != 2 && argc != 4) {
        fprintf(stderr, "usage: llm PORT [CERTIFICATE KEY]\n");
        return 2;
    }
    /* OpenSSL writes with write(2), which takes no MSG_NOSIGNAL: a client that has gone would end the server. */
    (void)signal(SIGPIPE, SIG_IGN);
    if (argc == 4) {
        set_up_tls(argv[2], argv[3]);
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max < MAX_FD ? files.rlim_max : MAX_FD;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    token_length = (size_t)snprintf(token, sizeof(token), "%zx\r\n%s\r\n", sizeof(TOKEN) - 1, TOKEN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    signals = watch_signals();
    event.data.fd = signals;
    if (signals < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, signals, &event) != 0) {
        die("signals");
    }
    address.sin_port = htons((uint16_t)atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    event.data.fd = listener;
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0
        || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0
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
            int fd = ready[i].data.fd;

            if (fd == listener) {
                on_listener(listener);
            }
            else if (fd == signals) {
                on_signal(fd);
            }
            else if (connections[fd] != NULL) {
                on_readable(fd, now);
            }
        }
        if (now >= swept + SWEEP) {
            swept = now;
            for (i = 0; i <= highest; i++) {
                if (connections[i] != NULL && connections[i]->left >= 0) {
                    go_on(i, now);
                }
            }
        }
    }
}
