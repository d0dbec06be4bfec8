/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_payload.h"
#include "tap.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE 100000
#define PIECES 30

static void pieces_come_back_whole(void)
{
    size_t length = (size_t)PIECE * PIECES;
    char *all = malloc(length);
    char *back = malloc(length + 1);
    int fd = handoff_payload_open();
    int bad = 0;
    size_t i;

    for (i = 0; i < length; i++) {
        all[i] = (char)(i * 31 + i / 251);
    }
    ok(fd >= 0, "a payload is opened");
    ok((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0, "and closed on exec");
    for (i = 0; i < PIECES; i++) {
        bad += handoff_payload_append(fd, all + i * PIECE, PIECE) != 0;
    }
    bad += handoff_payload_append(fd, "", 0) != 0;
    ok(bad == 0, "3 MB are appended in 30 pieces, and an empty one");
    ok(handoff_payload_load(fd, back, length) == 0 && memcmp(all, back, length) == 0,
       "and come back whole");
    ok(handoff_payload_load(fd, back, 5) == 0 && memcmp(all, back, 5) == 0, "or the first five");
    ok(handoff_payload_load(fd, back, length + 1) == EIO, "one byte more than there is: EIO");
    ok(handoff_payload_append(fd, "end", 3) == 0 && handoff_payload_load(fd, back, length + 1) == 0
       && back[length] == 'e', "loading does not move where the next piece goes");
    close(fd);
    free(back);
    free(all);
}

static void sealed_is_sealed(void)
{
    const int seals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
    int fd = handoff_payload_open();
    char back[5];
    struct stat st;
    void *map;
    char path[64];
    int again;

    handoff_payload_append(fd, "hello", 5);
    ok(handoff_payload_seal(fd) == 0, "it is sealed");
    ok((fcntl(fd, F_GET_SEALS) & seals) == seals, "with all four seals");
    ok(lseek(fd, 0, SEEK_CUR) == 0 && read(fd, back, 5) == 5 && memcmp(back, "hello", 5) == 0,
       "its offset is 0: a daemon may simply read it");
    ok(fstat(fd, &st) == 0 && st.st_size == 5, "its size is what was appended");
    ok(handoff_payload_append(fd, "x", 1) == EPERM, "nothing can be appended");
    ok(pwrite(fd, "x", 1, 0) == -1 && errno == EPERM, "nothing can be overwritten");
    ok(ftruncate(fd, 1) == -1 && errno == EPERM, "it cannot shrink");
    ok(ftruncate(fd, 9) == -1 && errno == EPERM, "it cannot grow");
    ok(mmap(NULL, 5, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED,
       "it cannot be mapped for writing");
    map = mmap(NULL, 5, PROT_READ, MAP_SHARED, fd, 0);
    ok(map != MAP_FAILED && memcmp(map, "hello", 5) == 0, "it can be mapped for reading");
    if (map != MAP_FAILED) {
        munmap(map, 5);
    }
    ok(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == -1 && errno == EPERM,
       "its seals cannot be changed");
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    again = open(path, O_RDWR | O_CLOEXEC);
    ok(again < 0 || (write(again, "x", 1) == -1 && errno == EPERM),
       "opening it anew gives nobody a way to write");
    if (again >= 0) {
        close(again);
    }
    close(fd);
}

static void failures_are_told(void)
{
    int fd = handoff_payload_open();
    struct rlimit old;
    struct rlimit small;
    void *map;
    char byte;

    ok(handoff_payload_append(-1, "x", 1) == EBADF, "append to no descriptor: EBADF");
    ok(handoff_payload_load(-1, &byte, 1) == EBADF, "load from no descriptor: EBADF");
    ok(handoff_payload_seal(-1) == EBADF, "seal no descriptor: EBADF");

    handoff_payload_append(fd, "hello", 5);
    map = mmap(NULL, 5, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ok(map != MAP_FAILED && handoff_payload_seal(fd) == EBUSY,
       "somebody still maps it for writing: EBUSY, never half a seal");
    munmap(map, 5);
    ok(handoff_payload_seal(fd) == 0, "and afterwards it can be sealed");
    close(fd);

    /* Stands for a machine without memory: the kernel stops in the middle of a piece. */
    fd = handoff_payload_open();
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 3;
    setrlimit(RLIMIT_FSIZE, &small);
    ok(handoff_payload_append(fd, "hello", 5) == EFBIG, "a piece that fits only in part: an error");
    setrlimit(RLIMIT_FSIZE, &old);
    close(fd);

    getrlimit(RLIMIT_NOFILE, &old);
    small = old;
    small.rlim_cur = 0;
    setrlimit(RLIMIT_NOFILE, &small);
    errno = 0;
    fd = handoff_payload_open();
    ok(fd == -1 && errno == EMFILE, "no descriptor left: EMFILE");
    setrlimit(RLIMIT_NOFILE, &old);
}

int main(void)
{
    pieces_come_back_whole();
    sealed_is_sealed();
    failures_are_told();
    return tap_end();
}
