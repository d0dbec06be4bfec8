/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "handoff_status.h"

#include "http_config.h"
#include "http_core.h"
#include "http_log.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

APLOG_USE_MODULE(socket_handoff);

/* Under this name httpd keeps, for as long as its main process lives, a pointer that survives both
 * the configuration's pool and the module, which a graceful restart unloads and loads again,
 * perhaps as a newer version. */
#define RETAINED_KEY "mod_socket_handoff:status"

/* These three never change, whatever the board becomes. */
typedef struct {
    apr_uint32_t layout;
    apr_size_t size;
    void *memory;
} retained_board;

static handoff_board *board;

static handoff_row *row_of(const handoff_declared_target *target)
{
    int slot = target != NULL ? target->slot : 0;

    return board != NULL && slot >= 0 ? &board->rows[slot] : NULL;
}

static apr_uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (apr_uint64_t)now.tv_sec * 1000 + (apr_uint64_t)(now.tv_nsec / 1000000);
}

void handoff_status_count(const handoff_declared_target *target, handoff_result result)
{
    handoff_row *row = row_of(target);

    if (row != NULL) {
        handoff_row_count(row, result);
    }
}

void handoff_status_sent(const handoff_declared_target *target, long microseconds,
                         apr_uint64_t bytes)
{
    handoff_row *row = row_of(target);

    if (row != NULL) {
        handoff_row_sent(row, microseconds > 0 ? (apr_uint64_t)microseconds : 0, bytes);
    }
}

int handoff_status_may_try(const handoff_declared_target *target, int deadline_ms, int *wait_ms)
{
    handoff_row *row = row_of(target);
    int lease_ms;

    *wait_ms = 0;
    if (row == NULL || target == NULL || target->max_fails == 0) {
        return 1;
    }
    lease_ms = deadline_ms > target->retry_ms ? deadline_ms : target->retry_ms;
    return handoff_row_may_try(row, target->max_fails, lease_ms, now_ms(), wait_ms);
}

void handoff_status_release(const handoff_declared_target *target)
{
    handoff_row *row = row_of(target);

    if (row != NULL) {
        handoff_row_release(row);
    }
}

int handoff_status_report(const handoff_declared_target *target, int worked)
{
    handoff_row *row = row_of(target);

    if (row == NULL || target == NULL) {
        return 0;
    }
    return handoff_row_report(row, worked, target->max_fails, target->retry_ms, now_ms());
}

void handoff_status_read(const handoff_declared_target *target, handoff_row_values *values)
{
    handoff_row *row = row_of(target);

    if (row == NULL) {
        memset(values, 0, sizeof(*values));
        return;
    }
    handoff_row_read(row, target != NULL ? target->max_fails : 0, now_ms(), values);
}

apr_int64_t handoff_status_since(void)
{
    return board != NULL ? board->since : 0;
}

/* Anonymous, so there is no file to clean up or to tamper with, and the children inherit it. */
static handoff_board *find_or_make_board(void)
{
    retained_board *retained = ap_retained_data_get(RETAINED_KEY);
    void *memory;

    if (retained == NULL) {
        retained = ap_retained_data_create(RETAINED_KEY, sizeof(*retained));
    }
    if (retained->memory != NULL && retained->layout == HANDOFF_BOARD_LAYOUT
        && retained->size == sizeof(handoff_board)) {
        return retained->memory;
    }
    memory = mmap(NULL, sizeof(handoff_board), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    if (retained->memory != NULL) {
        /* Another version's. Its children keep their own view until they leave. */
        munmap(retained->memory, retained->size);
    }
    retained->layout = HANDOFF_BOARD_LAYOUT;
    retained->size = sizeof(handoff_board);
    retained->memory = memory;
    ((handoff_board *)memory)->since = (int64_t)apr_time_sec(apr_time_now());
    return memory;
}

static int make_board(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp, server_rec *s)
{
    const apr_array_header_t *targets = handoff_declared_targets();
    const char **names = apr_pcalloc(ptemp, sizeof(*names) * (apr_size_t)(targets->nelts + 1));
    int *slots = apr_pcalloc(ptemp, sizeof(*slots) * (apr_size_t)(targets->nelts + 1));
    int i;

    (void)pconf;
    (void)plog;
    if (ap_state_query(AP_SQ_MAIN_STATE) == AP_SQ_MS_CREATE_PRE_CONFIG) {
        return OK;              /* the first of two readings at startup; nobody will be served */
    }
    board = find_or_make_board();
    if (board == NULL) {
        ap_log_error(APLOG_MARK, APLOG_EMERG | APLOG_STARTUP, APR_FROM_OS_ERROR(errno), s,
                     "no shared memory could be made for the counters of the targets (%"
                     APR_SIZE_T_FMT " bytes); see LimitAS and MemoryMax of apache2.service",
                     sizeof(handoff_board));
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    for (i = 0; i < targets->nelts; i++) {
        names[i] = APR_ARRAY_IDX(targets, i, handoff_declared_target *)->name;
    }
    handoff_board_claim(board, names, (size_t)targets->nelts, slots);
    for (i = 0; i < targets->nelts; i++) {
        APR_ARRAY_IDX(targets, i, handoff_declared_target *)->slot = slots[i];
    }
    return OK;
}

void handoff_status_register(void)
{
    ap_hook_post_config(make_board, NULL, NULL, APR_HOOK_MIDDLE);
    ap_hook_handler(handoff_status_page, NULL, NULL, APR_HOOK_MIDDLE);
}
