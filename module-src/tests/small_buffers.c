/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * For LD_PRELOAD: Unix sockets of a host with a small net.core.wmem_default. The integration tests
 * cannot change that for one process, and must not for the host.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <dlfcn.h>
#include <string.h>
#include <sys/socket.h>

/* Doubled by the kernel (socket(7)): 65536, and a message takes 32 less. */
#define BUFFER 32768

int socket(int domain, int type, int protocol)
{
    static int (*real)(int, int, int);
    int fd;

    if (real == NULL) {
        void *found = dlsym(RTLD_NEXT, "socket");

        memcpy(&real, &found, sizeof(real));
    }
    fd = real(domain, type, protocol);
    if (fd >= 0 && domain == AF_UNIX) {
        int size = BUFFER;

        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    }
    return fd;
}
