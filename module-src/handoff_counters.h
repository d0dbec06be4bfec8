/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_COUNTERS_H
#define HANDOFF_COUNTERS_H

/*
 * A board of rows, one per target, in memory that several processes share: what became of its
 * handoffs, how long they took, and whether it failed lately.
 *
 * Rules of this room: plain libc and C11 atomics, no httpd or APR type, no logging, no clock: the
 * caller says what time it is. Nothing waits or locks: a process may be killed at any instruction
 * and the others never notice. Each number is exact; two of them read together may be one event
 * apart.
 *
 * Only claiming writes names, and only one process claims; readers know their rows by number.
 */

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "handoff_result.h"
#include "handoff_target.h"

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock in shared memory could be held by the dead");

/* Upper bounds of the histogram's buckets: microseconds, and the same in seconds as text. One more
 * bucket has no bound. */
#define HANDOFF_BOUNDS(X) \
    X(100, "0.0001")    \
    X(250, "0.00025")   \
    X(500, "0.0005")    \
    X(1000, "0.001")    \
    X(2500, "0.0025")   \
    X(5000, "0.005")    \
    X(10000, "0.01")    \
    X(25000, "0.025")   \
    X(50000, "0.05")    \
    X(100000, "0.1")    \
    X(250000, "0.25")   \
    X(500000, "0.5")    \
    X(1000000, "1")

#define HANDOFF_COUNT_ONE(us, text) +1
enum { HANDOFF_BOUND_COUNT = 0 HANDOFF_BOUNDS(HANDOFF_COUNT_ONE) };
#undef HANDOFF_COUNT_ONE

#define HANDOFF_BUCKET_COUNT (HANDOFF_BOUND_COUNT + 1)

/* Twice as many targets as there may be, so that a row is not used again while processes of the
 * configuration before may still write to it; the first row is for what has no target. */
#define HANDOFF_ROW_COUNT 128

/* Cache lines of their own: who asks for the health must not wait for those who count. */
typedef struct {
    char name[HANDOFF_NAME_MAX + 1];
    uint32_t generation;          /* of the last configuration that declared it; 0: free          */
    alignas(64) _Atomic uint64_t results[HANDOFF_RESULT_COUNT];
    _Atomic uint64_t data_bytes;
    _Atomic uint64_t time_us;     /* of all in the buckets                                        */
    _Atomic uint64_t buckets[HANDOFF_BUCKET_COUNT];
    alignas(64) _Atomic uint64_t health;    /* failures in a row << 48 | skipped until, in ms     */
} handoff_row;

typedef struct {
    int64_t since;                /* when counting began, seconds since 1970                      */
    uint32_t generation;
    handoff_row rows[HANDOFF_ROW_COUNT];
} handoff_board;

/* Changes whenever the memory means something else. */
#define HANDOFF_BOARD_LAYOUT (1000 + HANDOFF_RESULT_COUNT)

/* A row as it was at one time. */
typedef struct {
    uint64_t results[HANDOFF_RESULT_COUNT];
    uint64_t data_bytes;
    uint64_t time_us;
    uint64_t buckets[HANDOFF_BUCKET_COUNT];     /* each without the ones below it                 */
    uint64_t count;                             /* of all buckets                                 */
    unsigned int fails;                         /* in a row                                       */
    int wait_ms;                                /* skipped for so long, 0: it is not              */
} handoff_row_values;

/* "0.0001" ... "1", "+Inf". Static. */
const char *handoff_bucket_bound(size_t bucket);

/* A new configuration declares these names: slots[i] becomes the row of names[i]. A known name
 * keeps its numbers, but whether it failed is forgotten. A new one gets a free row, or the one that
 * was undeclared for longest. Never more names than HANDOFF_ROW_COUNT - 1. */
void handoff_board_claim(handoff_board *board, const char *const *names, size_t count, int *slots);

void handoff_row_count(handoff_row *row, handoff_result result);
void handoff_row_sent(handoff_row *row, uint64_t microseconds, uint64_t data_bytes);

/* Whether to try a target now: 0, 1, or 2 for the one who tries for all, see
 * handoff_status_may_try. max_fails 0: always. Who is told to try
 * after failures has lease_ms for it; then it may be somebody else's turn. The time is any that
 * never goes back. */
int handoff_row_may_try(handoff_row *row, int max_fails, int lease_ms, uint64_t now_ms,
                        int *wait_ms);

/* Who was told 2 did not find out: somebody else may try at once. */
void handoff_row_release(handoff_row *row);

/* How that went, see handoff_status_report. */
int handoff_row_report(handoff_row *row, int worked, int max_fails, int retry_ms, uint64_t now_ms);

void handoff_row_read(handoff_row *row, int max_fails, uint64_t now_ms,
                      handoff_row_values *values);

#endif
