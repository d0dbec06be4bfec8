/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_payload.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Linux 6.3; not in the headers of Debian 12. */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

int handoff_payload_open(void)
{
    /* Where vm.memfd_noexec is 2 only this kind may be made; kernels before 6.3 do not know it. */
    int fd = memfd_create("handoff-payload", MFD_CLOEXEC | MFD_NOEXEC_SEAL);

    if (fd < 0 && errno == EINVAL) {
        fd = memfd_create("handoff-payload", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    }
    return fd;
}

int handoff_payload_append(int fd, const void *bytes, size_t length)
{
    const char *from = bytes;

    while (length > 0) {
        ssize_t n = write(fd, from, length);

        if (n > 0) {
            from += n;
            length -= (size_t)n;
        }
        else if (n == 0) {
            return EIO;
        }
        else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

int handoff_payload_load(int fd, void *into, size_t length)
{
    char *to = into;
    size_t done = 0;

    while (done < length) {
        ssize_t n = pread(fd, to + done, length - done, (off_t)done);

        if (n > 0) {
            done += (size_t)n;
        }
        else if (n == 0) {
            return EIO;
        }
        else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

int handoff_payload_seal(int fd)
{
    const int all = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;

    if (lseek(fd, 0, SEEK_SET) != 0) {
        return errno;
    }
    if ((fcntl(fd, F_GET_SEALS) & all) == all) {
        return 0;               /* for the target before; nothing can be added to F_SEAL_SEAL */
    }
    return fcntl(fd, F_ADD_SEALS, all) == 0 ? 0 : errno;
}
