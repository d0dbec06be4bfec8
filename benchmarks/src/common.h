/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

/* What all programs here need: a clock that does not go back, and an end with a reason. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SECOND 1000000000LL             /* nanoseconds */

/* Nanoseconds since some time before the program began. */
static inline int64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * SECOND + ts.tv_nsec;
}

/* Ends with errno's text behind `what`: nothing here can be measured without what failed. */
static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

#endif
