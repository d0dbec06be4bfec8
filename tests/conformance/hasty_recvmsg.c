/* SPDX-License-Identifier: Apache-2.0 */

/*
 * Preloaded into a daemon, this makes rule 9 of docs/wire-protocol.md come true every time: of two calls of recvmsg on one
 * SOCK_SEQPACKET connection the first says 0 although a message is queued, as Linux does once in thousands of handoffs.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/socket.h>

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    static ssize_t (*real)(int, struct msghdr *, int);
    static char second[1 << 16]; /* by descriptor */
    int kind = 0;
    socklen_t size = sizeof(kind);

    if (real == NULL) {
        real = (ssize_t(*)(int, struct msghdr *, int))dlsym(RTLD_NEXT, "recvmsg");
    }
    if (fd >= 0 && fd < (int)sizeof(second) && getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 &&
        kind == SOCK_SEQPACKET) {
        second[fd] = !second[fd];
        if (second[fd]) {
            message->msg_controllen = 0;
            message->msg_flags = 0;
            return 0;
        }
    }
    return real(fd, message, flags);
}
