/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_counters.h"
#include "tap.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROCESSES 4
#define THREADS 2
#define TIMES 5000

static handoff_board *new_board(void)
{
    void *memory = mmap(NULL, sizeof(handoff_board), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return memory;
}

static void free_board(handoff_board *board)
{
    munmap(board, sizeof(*board));
}

static void durations_fall_into_the_bucket_that_bounds_them(void)
{
    static const struct {
        uint64_t us;
        size_t bucket;
        const char *bound;
    } cases[] = {
        { 0, 0, "0.0001" }, { 100, 0, "0.0001" }, { 101, 1, "0.00025" }, { 250, 1, "0.00025" },
        { 1000, 3, "0.001" }, { 1001, 4, "0.0025" }, { 999999, 12, "1" }, { 1000000, 12, "1" },
        { 1000001, 13, "+Inf" }, { UINT64_C(3600000000), 13, "+Inf" },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        handoff_board *board = new_board();
        handoff_row_values values;

        handoff_row_sent(&board->rows[1], cases[i].us, 7);
        handoff_row_read(&board->rows[1], 0, 0, &values);
        ok(values.buckets[cases[i].bucket] == 1 && values.count == 1
           && values.time_us == cases[i].us && values.data_bytes == 7
           && strcmp(handoff_bucket_bound(cases[i].bucket), cases[i].bound) == 0,
           "%llu us fall below %s s", (unsigned long long)cases[i].us, cases[i].bound);
        free_board(board);
    }
}

static void *count_many(void *baton)
{
    handoff_row *row = baton;
    int i;

    for (i = 0; i < TIMES; i++) {
        handoff_row_count(row, HANDOFF_SENT);
        handoff_row_count(row, (handoff_result)(i % HANDOFF_RESULT_COUNT));
        handoff_row_sent(row, (uint64_t)i, 3);
        handoff_row_report(row, i % 3 != 0, 2, 100, (uint64_t)i);
    }
    return NULL;
}

static void counters_are_exact_across_processes_and_threads(void)
{
    handoff_board *board = new_board();
    handoff_row_values values;
    uint64_t total = 0;
    pid_t pids[PROCESSES];
    int i;

    for (i = 0; i < PROCESSES; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            pthread_t threads[THREADS];
            int t;

            for (t = 0; t < THREADS; t++) {
                pthread_create(&threads[t], NULL, count_many, &board->rows[5]);
            }
            for (t = 0; t < THREADS; t++) {
                pthread_join(threads[t], NULL);
            }
            raise(SIGKILL);     /* what it counted stays, however it ends */
        }
    }
    for (i = 0; i < PROCESSES; i++) {
        waitpid(pids[i], NULL, 0);
    }
    handoff_row_read(&board->rows[5], 0, 0, &values);
    for (i = 0; i < HANDOFF_RESULT_COUNT; i++) {
        total += values.results[i];
    }
    ok(total == (uint64_t)2 * PROCESSES * THREADS * TIMES, "no count of eight threads is lost");
    ok(values.count == (uint64_t)PROCESSES * THREADS * TIMES
       && values.data_bytes == values.count * 3
       && values.time_us == (uint64_t)PROCESSES * THREADS * TIMES * (TIMES - 1) / 2,
       "nor a duration, nor a byte");
    handoff_row_read(&board->rows[4], 0, 0, &values);
    ok(values.count == 0 && values.results[HANDOFF_SENT] == 0, "other rows are as they were");
    handoff_row_count(&board->rows[5], (handoff_result)-1);
    handoff_row_count(&board->rows[5], HANDOFF_RESULT_COUNT);
    ok(1, "a result that does not exist touches nothing");
    free_board(board);
}

static void who_did_not_find_out_leaves_the_try_to_the_next(void)
{
    handoff_board *board = new_board();
    handoff_row *row = &board->rows[1];
    int wait = -1;

    handoff_row_report(row, 0, 1, 500, 1000);
    ok(handoff_row_may_try(row, 1, 700, 1500, &wait) == 2, "one tries alone");
    ok(handoff_row_may_try(row, 1, 700, 1500, &wait) == 0, "and the others do not");
    handoff_row_release(row);
    ok(handoff_row_may_try(row, 1, 700, 1500, &wait) == 2, "after a release the next one does");
    ok(handoff_row_report(row, 1, 1, 500, 1501)
       && handoff_row_may_try(row, 1, 700, 1501, &wait) == 1, "and then everybody");
    free_board(board);
}

static void a_target_is_skipped_after_failures_in_a_row(void)
{
    handoff_board *board = new_board();
    handoff_row *row = &board->rows[1];
    handoff_row_values values;
    int wait = -1;

    ok(handoff_row_may_try(row, 3, 500, 1000, &wait) && wait == 0, "at first it is tried");
    ok(!handoff_row_report(row, 0, 3, 500, 1000) && !handoff_row_report(row, 0, 3, 500, 1001),
       "two failures of three change nothing");
    ok(handoff_row_may_try(row, 3, 500, 1001, &wait), "and it is tried on");
    ok(!handoff_row_report(row, 1, 3, 500, 1002) && !handoff_row_report(row, 0, 3, 500, 1003)
       && !handoff_row_report(row, 0, 3, 500, 1004), "a success begins the count anew");
    ok(handoff_row_report(row, 0, 3, 500, 1005), "the third in a row is reported as the change");
    ok(!handoff_row_may_try(row, 3, 500, 1005, &wait) && wait == 500, "it is skipped from then on");
    ok(!handoff_row_report(row, 0, 3, 500, 1006), "a fourth that was under way is no change");
    ok(!handoff_row_may_try(row, 3, 500, 1505, &wait) && wait == 1, "for 500 ms after the last");
    handoff_row_read(row, 3, 1406, &values);
    ok(values.fails == 4 && values.wait_ms == 100, "the page says how many and for how long");

    ok(handoff_row_may_try(row, 3, 700, 1506, &wait), "then one is told to try");
    ok(!handoff_row_may_try(row, 3, 700, 1506, &wait) && wait == 700, "and only one");
    ok(!handoff_row_may_try(row, 3, 700, 2205, &wait), "until it has reported");
    ok(handoff_row_may_try(row, 3, 700, 2206, &wait), "or is given up");
    ok(!handoff_row_report(row, 0, 3, 500, 2300), "its failure is no change");
    ok(!handoff_row_may_try(row, 3, 500, 2799, &wait) && wait == 1, "and begins the time anew");
    ok(handoff_row_may_try(row, 3, 500, 2800, &wait) && handoff_row_report(row, 1, 3, 500, 2801),
       "its success is the change");
    ok(handoff_row_may_try(row, 3, 500, 2801, &wait)
       && handoff_row_may_try(row, 3, 500, 2801, &wait), "and everybody tries again");
    ok(!handoff_row_report(row, 1, 3, 500, 2802), "a further success is no change");
    free_board(board);
}

static void a_target_with_maxfails_0_is_never_skipped(void)
{
    handoff_board *board = new_board();
    handoff_row_values values;
    int wait = -1;
    int changes = 0;
    int i;

    for (i = 0; i < 70000; i++) {
        changes += handoff_row_report(&board->rows[1], 0, 0, 500, 1000);
    }
    handoff_row_read(&board->rows[1], 0, 1000, &values);
    ok(changes == 0 && handoff_row_may_try(&board->rows[1], 0, 500, 1000, &wait) && wait == 0,
       "70,000 failures change nothing");
    ok(values.fails == 65535 && values.wait_ms == 0, "their number is bounded");
    ok(!handoff_row_report(&board->rows[1], 1, 0, 500, 1000), "and a success is no news");
    free_board(board);
}

typedef struct {
    handoff_row *row;
    pthread_barrier_t *barrier;
    int told;
    int changed;
} contender;

static void *contend(void *baton)
{
    contender *c = baton;
    int wait;

    pthread_barrier_wait(c->barrier);
    c->told = handoff_row_may_try(c->row, 1, 100, 1000, &wait) != 0;
    pthread_barrier_wait(c->barrier);
    c->changed = handoff_row_report(c->row, 1, 1, 100, 1000);
    return NULL;
}

static void of_many_at_once_one_tries_and_one_reports(void)
{
    handoff_board *board = new_board();
    pthread_barrier_t barrier;
    int wrong = 0;
    int round;

    pthread_barrier_init(&barrier, NULL, 4);
    for (round = 0; round < 300; round++) {
        pthread_t threads[4];
        contender c[4];
        int told = 0;
        int changed = 0;
        int i;

        handoff_row_report(&board->rows[1], 0, 1, 100, 0);
        for (i = 0; i < 4; i++) {
            c[i] = (contender){ &board->rows[1], &barrier, 0, 0 };
            pthread_create(&threads[i], NULL, contend, &c[i]);
        }
        for (i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            told += c[i].told;
            changed += c[i].changed;
        }
        wrong += told != 1 || changed != 1;
    }
    ok(wrong == 0, "of four at once one is told to try, and one change is reported, 300 times");
    pthread_barrier_destroy(&barrier);
    free_board(board);
}

static void rows_belong_to_names(void)
{
    static const char *const first[] = { "a", "b" };
    static const char *const second[] = { "c", "b" };
    handoff_board *board = new_board();
    handoff_row_values values;
    int one[2];
    int two[2];
    int wait;

    handoff_board_claim(board, first, 2, one);
    ok(one[0] > 0 && one[1] > 0 && one[0] != one[1], "each name gets a row, and none the first");
    handoff_row_count(&board->rows[one[0]], HANDOFF_SENT);
    handoff_row_count(&board->rows[one[1]], HANDOFF_NO_DAEMON);
    handoff_row_report(&board->rows[one[1]], 0, 1, 1000, 0);
    handoff_board_claim(board, second, 2, two);
    handoff_row_read(&board->rows[two[1]], 1, 0, &values);
    ok(two[1] == one[1] && values.results[HANDOFF_NO_DAEMON] == 1,
       "a name keeps its row and its numbers");
    ok(handoff_row_may_try(&board->rows[two[1]], 1, 1000, 0, &wait),
       "but a new configuration skips nothing");
    handoff_row_read(&board->rows[two[0]], 1, 0, &values);
    ok(two[0] != one[0] && values.results[HANDOFF_SENT] == 0, "a new name begins with zeros");
    handoff_board_claim(board, first, 2, two);
    handoff_row_read(&board->rows[two[0]], 1, 0, &values);
    ok(two[0] == one[0] && values.results[HANDOFF_SENT] == 1, "a name that comes back is known");
    handoff_board_claim(board, NULL, 0, NULL);
    ok(board->generation == 4, "there may be no names at all");
    free_board(board);
}

static void rows_are_used_again_when_there_is_no_other(void)
{
    enum { MANY = 63 };
    handoff_board *board = new_board();
    char names[4][MANY][HANDOFF_NAME_MAX + 1];
    const char *pointers[MANY];
    int slots[4][MANY];
    char used[4][HANDOFF_ROW_COUNT];
    handoff_row_values values;
    int clean = 1;
    int shared = 0;
    int round;
    int i;

    memset(used, 0, sizeof(used));
    for (round = 0; round < 4; round++) {
        for (i = 0; i < MANY; i++) {
            memset(names[round][i], 'x', HANDOFF_NAME_MAX);
            names[round][i][HANDOFF_NAME_MAX] = '\0';
            names[round][i][0] = (char)('a' + round);
            names[round][i][1] = (char)('0' + i);
            pointers[i] = names[round][i];
        }
        handoff_board_claim(board, pointers, MANY, slots[round]);
        for (i = 0; i < MANY; i++) {
            handoff_row_read(&board->rows[slots[round][i]], 0, 0, &values);
            clean = clean && values.results[HANDOFF_SENT] == 0 && slots[round][i] > 0
                    && slots[round][i] < HANDOFF_ROW_COUNT && !used[round][slots[round][i]]
                    && strcmp(board->rows[slots[round][i]].name, names[round][i]) == 0;
            handoff_row_count(&board->rows[slots[round][i]], HANDOFF_SENT);
            used[round][slots[round][i]] = 1;
            shared += round > 0 && used[round - 1][slots[round][i]];
        }
    }
    ok(clean, "63 new names, four times: each has a clean row of its own");
    ok(shared == 0, "and none that the configuration before was still using");
    free_board(board);
}

int main(void)
{
    durations_fall_into_the_bucket_that_bounds_them();
    counters_are_exact_across_processes_and_threads();
    a_target_is_skipped_after_failures_in_a_row();
    who_did_not_find_out_leaves_the_try_to_the_next();
    a_target_with_maxfails_0_is_never_skipped();
    of_many_at_once_one_tries_and_one_reports();
    rows_belong_to_names();
    rows_are_used_again_when_there_is_no_other();
    return tap_end();
}
