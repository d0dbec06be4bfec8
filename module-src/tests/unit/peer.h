/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef PEER_H
#define PEER_H

/* The other end, for the tests of the wire: a socket in a directory of its own, and what a daemon
 * does with it. Include it after defining _GNU_SOURCE. */

#include "handoff_wire.h"
#include "tap.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static char path[] = "/tmp/handoff-wire-XXXXXX/d.sock";
static int opened;                          /* how often the wire asked for the name */

static int open_path(void *baton)
{
    opened++;
    return open(baton, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

static inline handoff_wire_order order_for(int connect_ms, int send_ms, int retries)
{
    handoff_wire_order order = {
        .open_name = open_path, .baton = path, .peer_uid = -1,
        .connect_timeout_ms = connect_ms, .send_timeout_ms = send_ms, .max_retries = retries
    };

    opened = 0;
    return order;
}

static inline void address_of(struct sockaddr_un *address)
{
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    strncpy(address->sun_path, path, sizeof(address->sun_path) - 1);
}

static inline int listen_as(int type, int backlog)
{
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

    address_of(&address);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0
        || (type != SOCK_DGRAM && listen(fd, backlog) != 0)) {
        perror("listen_as");
        exit(1);
    }
    return fd;
}

/* Receives all there is until the other end hangs up. Returns how many bytes, and the descriptors,
 * at most 8, in fds. */
static inline size_t receive_all(int conn, char *bytes, size_t room, int *fds, int *count)
{
    size_t total = 0;

    *count = 0;
    for (;;) {
        union {
            char space[CMSG_SPACE(sizeof(int) * 8)];
            struct cmsghdr align;
        } control;
        struct iovec iov = { bytes + total, room - total };
        struct msghdr msg;
        struct cmsghdr *cmsg;
        ssize_t n;

        memset(&msg, 0, sizeof(msg));
        msg.msg_iov = &iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        n = recvmsg(conn, &msg, MSG_CMSG_CLOEXEC);
        if (n <= 0) {
            return total;
        }
        total += (size_t)n;
        for (cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
            size_t size = cmsg->cmsg_len - CMSG_LEN(0);

            memcpy(fds + *count, CMSG_DATA(cmsg), size);
            *count += (int)(size / sizeof(int));
        }
    }
}

/* The same on the next connection. */
static inline size_t receive(int listener, char *bytes, size_t room, int *fds, int *count)
{
    int conn = accept(listener, NULL, NULL);
    size_t total = receive_all(conn, bytes, room, fds, count);

    close(conn);
    return total;
}

static inline int count_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    while (readdir(dir) != NULL) {
        count++;
    }
    closedir(dir);
    return count;
}

static inline int same_pipe(int a, int b)
{
    struct stat x;
    struct stat y;

    return a >= 0 && b >= 0 && fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_ino == y.st_ino;
}

static inline void make_place(void)
{
    char *slash = strrchr(path, '/');

    *slash = '\0';
    if (mkdtemp(path) == NULL) {
        perror(path);
        exit(1);
    }
    *slash = '/';
}

static inline void remove_place(void)
{
    unlink(path);
    *strrchr(path, '/') = '\0';
    rmdir(path);
}

/* Runs tests that send one and the same descriptor, up to NULL, and looks for what they leaked. */
static inline int run_with_client(void (*const *tests)(int client))
{
    int client[2];
    int before;

    make_place();
    if (pipe(client) != 0) {
        perror("pipe");
        return 1;
    }
    before = count_descriptors();
    while (*tests != NULL) {
        (*tests++)(client[0]);
    }
    ok(count_descriptors() == before, "no descriptor is leaked, the client's is still open");
    remove_place();
    return tap_end();
}

#endif
