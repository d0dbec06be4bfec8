/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_counters.h"

#include <string.h>

/* Nothing is published by these numbers but themselves, so no order among them is needed. */
#define RELAXED memory_order_relaxed

#define MAX_FAILS 0xffffu

static void add(_Atomic uint64_t *number, uint64_t more)
{
    atomic_fetch_add_explicit(number, more, RELAXED);
}

static uint64_t get(_Atomic uint64_t *number)
{
    return atomic_load_explicit(number, RELAXED);
}

const char *handoff_bucket_bound(size_t bucket)
{
#define BOUND_TEXT(us, text) text,
    static const char *const texts[] = { HANDOFF_BOUNDS(BOUND_TEXT) };
#undef BOUND_TEXT

    return bucket < HANDOFF_BOUND_COUNT ? texts[bucket] : "+Inf";
}

/* --- rows ------------------------------------------------------------------------------------ */

static void clear(handoff_row *row)
{
    size_t i;

    for (i = 0; i < HANDOFF_RESULT_COUNT; i++) {
        atomic_store_explicit(&row->results[i], 0, RELAXED);
    }
    for (i = 0; i < HANDOFF_BUCKET_COUNT; i++) {
        atomic_store_explicit(&row->buckets[i], 0, RELAXED);
    }
    atomic_store_explicit(&row->data_bytes, 0, RELAXED);
    atomic_store_explicit(&row->time_us, 0, RELAXED);
}

static int find_row(const handoff_board *board, const char *name)
{
    int i;

    for (i = 1; i < HANDOFF_ROW_COUNT; i++) {
        if (board->rows[i].generation != 0 && strcmp(board->rows[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

/* Free rows are of generation 0, so they are the oldest of all. */
static int oldest_row(const handoff_board *board)
{
    int oldest = 1;
    int i;

    for (i = 2; i < HANDOFF_ROW_COUNT; i++) {
        if (board->rows[i].generation < board->rows[oldest].generation) {
            oldest = i;
        }
    }
    return oldest;
}

void handoff_board_claim(handoff_board *board, const char *const *names, size_t count, int *slots)
{
    size_t i;

    board->generation++;
    for (i = 0; i < count; i++) {
        slots[i] = find_row(board, names[i]);
        if (slots[i] > 0) {
            board->rows[slots[i]].generation = board->generation;
            atomic_store_explicit(&board->rows[slots[i]].health, 0, RELAXED);
        }
    }
    /* Only now, so that none of the known ones is taken for the oldest. */
    for (i = 0; i < count; i++) {
        handoff_row *row;

        if (slots[i] > 0) {
            continue;
        }
        slots[i] = oldest_row(board);
        row = &board->rows[slots[i]];
        clear(row);
        atomic_store_explicit(&row->health, 0, RELAXED);
        memset(row->name, 0, sizeof(row->name));
        memcpy(row->name, names[i], strnlen(names[i], HANDOFF_NAME_MAX));
        row->generation = board->generation;
    }
}

void handoff_row_count(handoff_row *row, handoff_result result)
{
    if (result >= 0 && result < HANDOFF_RESULT_COUNT) {
        add(&row->results[result], 1);
    }
}

void handoff_row_sent(handoff_row *row, uint64_t microseconds, uint64_t data_bytes)
{
#define BOUND_US(us, text) us,
    static const uint32_t bounds[] = { HANDOFF_BOUNDS(BOUND_US) };
#undef BOUND_US
    size_t i = 0;

    while (i < HANDOFF_BOUND_COUNT && microseconds > bounds[i]) {
        i++;
    }
    add(&row->buckets[i], 1);
    add(&row->time_us, microseconds);
    add(&row->data_bytes, data_bytes);
}

/* --- health ---------------------------------------------------------------------------------- */

/* Failures in a row and the end of skipping are one number, so that they change together. 48 bits
 * of milliseconds last for 8900 years. */
static uint64_t pack(unsigned int fails, uint64_t until_ms)
{
    return (uint64_t)fails << 48 | (until_ms & UINT64_C(0xffffffffffff));
}

static unsigned int fails_of(uint64_t health)
{
    return (unsigned int)(health >> 48);
}

static uint64_t until_of(uint64_t health)
{
    return health & UINT64_C(0xffffffffffff);
}

/* Whether a target with this health is down: skipped, or being tried by one caller. */
static int is_down(uint64_t health, int max_fails)
{
    return max_fails > 0 && fails_of(health) >= (unsigned int)max_fails;
}

static int exchange(handoff_row *row, uint64_t *seen, uint64_t wanted)
{
    return atomic_compare_exchange_strong_explicit(&row->health, seen, wanted, RELAXED, RELAXED);
}

int handoff_row_may_try(handoff_row *row, int max_fails, int lease_ms, uint64_t now_ms,
                        int *wait_ms)
{
    uint64_t health = get(&row->health);

    do {
        *wait_ms = 0;
        if (!is_down(health, max_fails)) {
            return 1;
        }
        if (now_ms < until_of(health)) {
            *wait_ms = (int)(until_of(health) - now_ms);
            return 0;
        }
        /* The one who moves the end tries. If he dies on the way, the lease ends all the same. */
    } while (!exchange(row, &health, pack(fails_of(health), now_ms + (uint64_t)lease_ms)));
    return 2;
}

void handoff_row_release(handoff_row *row)
{
    uint64_t health = get(&row->health);
    uint64_t next;

    do {
        next = pack(fails_of(health), 0);
    } while (!exchange(row, &health, next));
}

int handoff_row_report(handoff_row *row, int worked, int max_fails, int retry_ms, uint64_t now_ms)
{
    uint64_t health = get(&row->health);
    uint64_t next;

    do {
        if (worked) {
            if (health == 0) {
                return 0;       /* the usual case writes nothing, so the line stays shared */
            }
            next = 0;
        }
        else {
            unsigned int fails = fails_of(health) < MAX_FAILS ? fails_of(health) + 1 : MAX_FAILS;

            next = pack(fails, 0);
            if (is_down(next, max_fails)) {
                next = pack(fails, now_ms + (uint64_t)retry_ms);
            }
        }
    } while (!exchange(row, &health, next));
    return is_down(health, max_fails) != is_down(next, max_fails);
}

void handoff_row_read(handoff_row *row, int max_fails, uint64_t now_ms,
                      handoff_row_values *values)
{
    uint64_t health = get(&row->health);
    size_t i;

    values->count = 0;
    for (i = 0; i < HANDOFF_RESULT_COUNT; i++) {
        values->results[i] = get(&row->results[i]);
    }
    for (i = 0; i < HANDOFF_BUCKET_COUNT; i++) {
        values->buckets[i] = get(&row->buckets[i]);
        values->count += values->buckets[i];
    }
    values->data_bytes = get(&row->data_bytes);
    values->time_us = get(&row->time_us);
    values->fails = fails_of(health);
    values->wait_ms = is_down(health, max_fails) && now_ms < until_of(health)
                      ? (int)(until_of(health) - now_ms) : 0;
}
