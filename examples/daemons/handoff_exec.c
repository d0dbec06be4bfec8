/* SPDX-License-Identifier: Apache-2.0 */

/*
 * handoff_exec: a daemon that runs any program for each client, with the client's connection as its standard input and
 * output, and what is known of the request in its environment. What inetd was, behind Apache and an application's login.
 *
 *  1. Apache connects to our SOCK_SEQPACKET socket once for every client, sends one message and hangs up.
 *  2. With the message comes a descriptor (SCM_RIGHTS): the client's TCP connection, which is ours alone from then on.
 *  3. Where the target says ack=on (here: -a) we say one byte, 0x06, after accept; until then Apache sends nothing.
 *  4. A plain message is the application's data, or one NUL byte. It says nothing of the request: never chunk then.
 *  5. An envelope is a JSON object that begins {"handoff":2 and has the request, the application's headers and its data.
 *  6. Data that is too large for it is in a second descriptor, a memfd: check its seals and length, then read it from 0.
 *  7. The program writes the whole HTTP response, with Connection: close; to HEAD the head only. With -t we write a head.
 *  8. At the end: shutdown(SHUT_WR), read and forget what the client still sends, close. A bare close cuts the answer.
 *  9. What is wrong with a message: 400 to the client who came with it, and every descriptor is closed.
 * 10. recvmsg may say 0 while a message is queued, and ECONNRESET where our 0x06 was not read: receive once more.
 *
 * All of it is docs/wire-protocol.md. systemd gives us the socket (LISTEN_FDS), see systemd/ beside this file. To try it:
 *
 *     gcc -O2 -Wall -o handoff_exec handoff_exec.c -ljansson      (Debian: gcc libc6-dev libjansson-dev)
 *     systemd-socket-activate --seqpacket -l /run/handoff-exec.sock ./handoff_exec -t text/plain /usr/bin/env
 *
 * usage: handoff_exec [-a] [-t TYPE] PROGRAM [ARGUMENT…]
 *
 * The program finds its data on descriptor 3, from the beginning, and in HANDOFF_DATA where it is at most 100,000 bytes
 * without NUL. HANDOFF_RESPONSE_HEADERS has the lines that the application wants in the head. Of an envelope there are,
 * named as for CGI, REQUEST_METHOD, REQUEST_URI, SERVER_PROTOCOL, REQUEST_SCHEME, HTTP_HOST, REMOTE_ADDR, REMOTE_PORT,
 * REMOTE_USER, the request's headers that the target asks for (HTTP_ACCEPT_LANGUAGE), HANDOFF_ID and HANDOFF_TARGET. Of
 * the daemon's own environment there are PATH and LANG.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>

enum {
    MOST_STREAMS = 500,        /* processes; more clients wait in the socket's queue */
    MOST_MESSAGE = 1 << 18,
    MOST_PAYLOAD = 8 << 20,
    MOST_IN_ENVIRONMENT = 100000, /* the kernel takes 128 KiB in one string */
    MOST_FDS = 253,            /* the kernel passes no more at once */
    MESSAGE_TIMEOUT = 5,       /* seconds for Apache to send what it connected for */
    WRITE_TIMEOUT = 30,        /* seconds for a client to read; then the program's write fails with EAGAIN */
    LINGER_TIMEOUT = 2,        /* seconds for a client to hang up after the answer */
    LISTENER = 3,              /* the first descriptor that systemd passes, sd_listen_fds(3) */
    DATA = 3                   /* where the program finds its data */
};

static const int SEALS = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK;

/* One handoff. A process has only one, and ends with it: the kernel closes and frees what it had. */
static struct {
    char bytes[MOST_MESSAGE + 1];
    size_t length;
    int fds[MOST_FDS]; /* the client first */
    int count;
    bool cut; /* bytes or descriptors are missing */
    bool head_only;
} message;

static void set_timeout(int fd, int option, int seconds)
{
    struct timeval value = {seconds, 0};

    setsockopt(fd, SOL_SOCKET, option, &value, sizeof(value));
}

static void write_all(int fd, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(fd, bytes, length, MSG_NOSIGNAL);

        if (sent <= 0) {
            _exit(0); /* the client left, or does not read */
        }
        bytes += sent;
        length -= (size_t)sent;
    }
}

/* FIN now; then wait for the client's, because a close with unread bytes resets the connection. */
static void linger_and_exit(int client)
{
    char forgotten[65536];
    time_t until = time(NULL) + LINGER_TIMEOUT;

    if (shutdown(client, SHUT_WR) == 0) {
        set_timeout(client, SO_RCVTIMEO, LINGER_TIMEOUT);
        while (time(NULL) <= until && recv(client, forgotten, sizeof(forgotten), 0) > 0) {
            continue;
        }
    }
    _exit(0);
}

static void refuse(const char *why)
{
    char body[256];
    char head[512];
    int client = message.fds[0];
    int length = snprintf(body, sizeof(body), "{\"error\":{\"type\":\"bad_request\",\"message\":\"%s\"}}", why);
    int size = snprintf(head, sizeof(head),
                        "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
                        "Cache-Control: no-store\r\nContent-Length: %d\r\n\r\n%s",
                        length, message.head_only ? "" : body);

    write_all(client, head, (size_t)size);
    linger_and_exit(client);
}

/* The one message of this connection; false where none comes. */
static bool receive(int apache)
{
    union {
        struct cmsghdr header; /* for its alignment */
        char room[CMSG_SPACE(sizeof(int) * MOST_FDS)];
    } control;
    int tries;

    for (tries = 0; tries < 3; tries++) {
        struct iovec part = {message.bytes, MOST_MESSAGE};
        struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                           .msg_controllen = sizeof(control)};
        struct pollfd ready = {apache, POLLIN, 0};
        struct cmsghdr *c;
        ssize_t length;

        if (poll(&ready, 1, MESSAGE_TIMEOUT * 1000) != 1) {
            return false;
        }
        length = recvmsg(apache, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (length < 0 && errno != ECONNRESET) {
            return false;
        }
        if (length < 0 || (length == 0 && m.msg_controllen == 0)) {
            continue;
        }
        for (c = CMSG_FIRSTHDR(&m); c != NULL; c = CMSG_NXTHDR(&m, c)) {
            if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
                message.count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
                memcpy(message.fds, CMSG_DATA(c), (size_t)message.count * sizeof(int));
            }
        }
        message.length = (size_t)length;
        message.cut = (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
        return true;
    }
    return false;
}

static bool is_between(const json_t *value, json_int_t low, json_int_t high)
{
    return json_is_integer(value) && json_integer_value(value) >= low && json_integer_value(value) <= high;
}

static bool is_end(const json_t *value)
{
    return json_is_string(json_object_get(value, "addr")) && is_between(json_object_get(value, "port"), 0, 65535);
}

static bool is_headers(const json_t *value)
{
    size_t i;
    json_t *pair;

    if (!json_is_array(value)) {
        return false;
    }
    json_array_foreach(value, i, pair) {
        if (!json_is_array(pair) || json_array_size(pair) != 2 || !json_is_string(json_array_get(pair, 0)) ||
            !json_is_string(json_array_get(pair, 1))) {
            return false;
        }
    }
    return true;
}

/* Members that we do not know are ignored; one that is missing or of the wrong form spoils the whole. */
static json_t *parse_envelope(void)
{
    static const char *const texts[] = {"id", "method", "uri", "protocol", "scheme", "target"};
    static const char *const nullable[] = {"host", "data"};
    const size_t flags = JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL;
    json_t *e = json_loadb(message.bytes, message.length, flags, NULL);
    const char *method = json_string_value(json_object_get(e, "method"));
    const json_t *user = json_object_get(e, "user");
    size_t i;

    message.head_only = method != NULL && strcmp(method, "HEAD") == 0;
    if (!json_is_object(e) || !is_between(json_object_get(e, "handoff"), 2, 2)) {
        refuse("the message must be a JSON object of version 2");
    }
    for (i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
        if (!json_is_string(json_object_get(e, texts[i]))) {
            refuse("a text is missing or wrong");
        }
    }
    for (i = 0; i < sizeof(nullable) / sizeof(*nullable); i++) {
        const json_t *value = json_object_get(e, nullable[i]);

        if (!json_is_string(value) && !json_is_null(value)) {
            refuse("host or data is missing or wrong");
        }
    }
    if (!is_end(json_object_get(e, "client")) || !is_end(json_object_get(e, "peer"))) {
        refuse("client or peer is missing or wrong");
    }
    if (!is_headers(json_object_get(e, "headers")) || !is_headers(json_object_get(e, "response_headers"))) {
        refuse("headers or response_headers is missing or wrong");
    }
    if (!is_between(json_object_get(e, "status"), 100, 999) ||
        !is_between(json_object_get(e, "unread_body"), -1, INT64_MAX) ||
        !is_between(json_object_get(e, "prefetched"), 0, INT64_MAX)) {
        refuse("status, unread_body or prefetched is missing or wrong");
    }
    if (user != NULL && !json_is_string(user)) {
        refuse("user is wrong");
    }
    return e;
}

/* A file in memory with these bytes, at its beginning. */
static int memory_file(const char *bytes, size_t length)
{
    int fd = memfd_create("data", MFD_CLOEXEC);

    while (fd >= 0 && length > 0) {
        ssize_t written = write(fd, bytes, length);

        if (written <= 0) {
            refuse("no memory for the data");
        }
        bytes += written;
        length -= (size_t)written;
    }
    lseek(fd, 0, SEEK_SET);
    return fd;
}

/* The data as a file. Sealed as it is, the payload can be it; but its offset is also Apache's, until that has closed. */
static int data_of(const json_t *e)
{
    const json_t *data = json_object_get(e, "data");
    const json_t *payload = json_object_get(e, "payload");
    const json_t *length = json_object_get(payload, "length");
    struct stat stat;
    char *bytes;

    if (payload == NULL) {
        if (message.count != 1) {
            refuse("a descriptor too many");
        }
        return memory_file(json_string_value(data), json_string_length(data));
    }
    if (message.count != 2 || !json_is_true(json_object_get(payload, "memfd")) || !json_is_null(data) ||
        !is_between(length, 0, MOST_PAYLOAD)) {
        refuse("payload is wrong");
    }
    /* fcntl says -1, which has all bits, for what is no memfd. */
    if (fcntl(message.fds[1], F_GET_SEALS) < 0 || (fcntl(message.fds[1], F_GET_SEALS) & SEALS) != SEALS ||
        fstat(message.fds[1], &stat) != 0 || stat.st_size != json_integer_value(length)) {
        refuse("payload is not a sealed memfd of that length");
    }
    if (stat.st_size == 0) {
        return memory_file("", 0);
    }
    bytes = mmap(NULL, (size_t)stat.st_size, PROT_READ, MAP_PRIVATE, message.fds[1], 0);
    if (bytes == MAP_FAILED) {
        refuse("payload cannot be read");
    }
    return memory_file(bytes, (size_t)stat.st_size);
}

/* A variable of the program; not one that has NUL in it, where it would end early, or is longer than the kernel takes. */
static void set(const char *name, const json_t *value)
{
    const char *text = json_string_value(value);

    if (text != NULL && strlen(text) == json_string_length(value) && strlen(text) <= MOST_IN_ENVIRONMENT) {
        setenv(name, text, 1);
    }
}

/* Whether the program may send this header: not one that frames the response or describes another body. */
static bool may_be_sent(const char *name, const json_t *value)
{
    static const char *const not_copied[] = {
        "connection", "content-length", "content-type", "date", "keep-alive", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    };
    const char *text = json_string_value(value);
    size_t i;

    for (i = 0; i < sizeof(not_copied) / sizeof(*not_copied); i++) {
        if (strcasecmp(name, not_copied[i]) == 0) {
            return false;
        }
    }
    return *name != '\0' && name[strspn(name, "!#$%&'*+.^_`|~-0123456789abcdefghijklmnopqrstuvwxyz"
                                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ")] == '\0' &&
           strlen(text) == json_string_length(value) && strpbrk(text, "\r\n") == NULL;
}

/* The application's headers as lines; Cache-Control, where it says none, as for every stream. */
static char *head_lines(const json_t *headers)
{
    char *lines = NULL;
    size_t size, i;
    bool cache = false;
    json_t *pair;
    FILE *out = open_memstream(&lines, &size);

    json_array_foreach(headers, i, pair) {
        const char *name = json_string_value(json_array_get(pair, 0));

        if (strlen(name) == json_string_length(json_array_get(pair, 0)) &&
            may_be_sent(name, json_array_get(pair, 1))) {
            fprintf(out, "%s: %s\r\n", name, json_string_value(json_array_get(pair, 1)));
            cache = cache || strcasecmp(name, "cache-control") == 0;
        }
    }
    fputs(cache ? "" : "Cache-Control: no-cache\r\n", out);
    fclose(out);
    return lines;
}

static void describe_request(const json_t *e)
{
    char name[256];
    size_t i, j;
    json_t *pair;

    set("HANDOFF_ID", json_object_get(e, "id"));
    set("HANDOFF_TARGET", json_object_get(e, "target"));
    set("REQUEST_METHOD", json_object_get(e, "method"));
    set("REQUEST_URI", json_object_get(e, "uri"));
    set("SERVER_PROTOCOL", json_object_get(e, "protocol"));
    set("REQUEST_SCHEME", json_object_get(e, "scheme"));
    set("REMOTE_USER", json_object_get(e, "user"));
    set("REMOTE_ADDR", json_object_get(json_object_get(e, "client"), "addr"));
    snprintf(name, sizeof(name), "%lld",
             (long long)json_integer_value(json_object_get(json_object_get(e, "client"), "port")));
    setenv("REMOTE_PORT", name, 1);
    json_array_foreach(json_object_get(e, "headers"), i, pair) {
        const char *header = json_string_value(json_array_get(pair, 0));

        /* HTTP_PROXY would be taken for a setting by many programs. */
        if (strlen(header) < sizeof(name) - 6 && strcasecmp(header, "proxy") != 0) {
            snprintf(name, sizeof(name), "HTTP_%s", header);
            for (j = 5; name[j] != '\0'; j++) {
                name[j] = (char)(isalnum((unsigned char)name[j]) ? toupper((unsigned char)name[j]) : '_');
            }
            set(name, json_array_get(pair, 1));
        }
    }
    set("HTTP_HOST", json_object_get(e, "host"));
}

static void run(char **program, int client, int data, const char *type)
{
    pid_t pid;

    if (type != NULL) {
        const char *head = "HTTP/1.1 200 OK\r\nConnection: close\r\nX-Accel-Buffering: no\r\nContent-Type: ";

        write_all(client, head, strlen(head));
        write_all(client, type, strlen(type));
        write_all(client, "\r\n", 2);
        write_all(client, getenv("HANDOFF_RESPONSE_HEADERS"), strlen(getenv("HANDOFF_RESPONSE_HEADERS")));
        write_all(client, "\r\n", 2);
    }
    if (type == NULL || !message.head_only) {
        pid = fork();
        if (pid == 0) {
            /* dup2 takes the mark away that closes all others when the program starts. */
            if (dup2(client, 0) < 0 || dup2(client, 1) < 0 || (data != DATA && dup2(data, DATA) < 0) ||
                fcntl(DATA, F_SETFD, 0) != 0) {
                _exit(127);
            }
            signal(SIGPIPE, SIG_DFL); /* systemd has it ignored, and that is inherited */
            execvp(program[0], program);
            perror(program[0]);
            _exit(127);
        }
        /* A client that has left ends the program too, at its next write (SIGPIPE). */
        if (pid > 0) {
            waitpid(pid, NULL, 0);
        }
    }
    linger_and_exit(client);
}

/* One handoff, from Apache's connection to the client's end. */
static void serve(int apache, bool ack, const char *type, char **program)
{
    int kind = 0, data, client;
    socklen_t size = sizeof(kind);
    const char *path = getenv("PATH"), *lang = getenv("LANG");

    if (ack) {
        (void)send(apache, "\006", 1, MSG_NOSIGNAL); /* an error only says that it was not waited for */
    }
    if (!receive(apache) || message.count == 0) {
        _exit(0);
    }
    close(apache);
    client = message.fds[0];
    if (getsockopt(client, SOL_SOCKET, SO_TYPE, &kind, &size) != 0 || kind != SOCK_STREAM) {
        fputs("handoff ended: the descriptor is no stream socket\n", stderr);
        _exit(0);
    }
    /* It came O_NONBLOCK, which few programs expect of their output. */
    fcntl(client, F_SETFL, fcntl(client, F_GETFL) & ~O_NONBLOCK);
    set_timeout(client, SO_SNDTIMEO, WRITE_TIMEOUT);
    if (message.cut) {
        refuse("the message is too long");
    }
    path = strdup(path != NULL ? path : "/usr/bin:/bin");
    lang = strdup(lang != NULL ? lang : "C.UTF-8");
    clearenv();
    setenv("PATH", path, 1);
    setenv("LANG", lang, 1);
    if (message.length > 12 && strncmp(message.bytes, "{\"handoff\":", 11) == 0 &&
        (isdigit((unsigned char)message.bytes[11]) || message.bytes[11] == '-')) {
        json_t *e = parse_envelope();

        describe_request(e);
        setenv("HANDOFF_RESPONSE_HEADERS", head_lines(json_object_get(e, "response_headers")), 1);
        data = data_of(e);
    } else {
        if (message.count != 1) {
            refuse("a descriptor too many");
        }
        setenv("HANDOFF_RESPONSE_HEADERS", head_lines(NULL), 1);
        data = memory_file(message.bytes, message.length == 1 && message.bytes[0] == '\0' ? 0 : message.length);
    }
    if (data >= 0) {
        char *text = calloc(1, MOST_IN_ENVIRONMENT + 2);
        ssize_t length = pread(data, text, MOST_IN_ENVIRONMENT + 1, 0);

        if (length >= 0 && length <= MOST_IN_ENVIRONMENT && strlen(text) == (size_t)length) {
            setenv("HANDOFF_DATA", text, 1);
        }
    }
    run(program, client, data, type);
}

int main(int argc, char **argv)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS"), *type = NULL;
    bool ack = false;
    int option, running = 0;

    while ((option = getopt(argc, argv, "+at:")) != -1) {
        if (option == 'a') {
            ack = true;
        } else if (option == 't') {
            type = optarg;
        } else {
            argc = 0;
        }
    }
    if (optind >= argc) {
        fputs("usage: handoff_exec [-a] [-t TYPE] PROGRAM [ARGUMENT...]\n", stderr);
        return 2;
    }
    if (pid == NULL || atoi(pid) != getpid() || count == NULL || strcmp(count, "1") != 0) {
        fputs("start me by a .socket unit with one ListenSequentialPacket=, or by systemd-socket-activate --seqpacket\n",
              stderr);
        return 1;
    }
    fcntl(LISTENER, F_SETFD, FD_CLOEXEC);
    for (;;) {
        struct pollfd ready = {LISTENER, POLLIN, 0};
        int apache;
        pid_t child;

        /* Forget the processes that have ended; wait for one of them where there are too many. */
        while (running > 0 && waitpid(-1, NULL, running < MOST_STREAMS ? WNOHANG : 0) > 0) {
            running--;
        }
        if (poll(&ready, 1, 1000) != 1) {
            continue;
        }
        apache = accept4(LISTENER, NULL, NULL, SOCK_CLOEXEC);
        if (apache < 0) {
            continue;
        }
        /* No process or memory left, for now: whoever has come must not be dropped for it. */
        while ((child = fork()) < 0) {
            poll(NULL, 0, 100);
        }
        if (child == 0) {
            close(LISTENER);
            serve(apache, ack, type, argv + optind);
        }
        running++;
        close(apache);
    }
}
