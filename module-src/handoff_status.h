/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_STATUS_H
#define HANDOFF_STATUS_H

/*
 * Counters of all targets in memory that all processes share, the page that shows them
 * (SetHandler socket-handoff-status), and the memory of which target failed lately.
 *
 * One row per declared target, one for handoffs to undeclared paths (target NULL), which also
 * counts what ended before there was a target. A row keeps its numbers over graceful restarts, as
 * long as a target of that name is declared. Everything is atomic and lock-free; a process that
 * is killed anywhere leaves it consistent. handoff_counters.h is what lies in the memory.
 */

#include "httpd.h"

#include "handoff_config.h"
#include "handoff_counters.h"
#include "handoff_result.h"

/* Hooks: makes the shared memory after the configuration is read, and answers requests. */
void handoff_status_register(void);

/* One more of these. target may be NULL. */
void handoff_status_count(const handoff_declared_target *target, handoff_result result);

/* A handoff that was sent took so long, in microseconds, and carried so many bytes of data. */
void handoff_status_sent(const handoff_declared_target *target, long microseconds,
                         apr_uint64_t bytes);

/* Whether to try this target now: 0, 1, or HANDOFF_TRY_ALONE.
 *
 * 0: it failed max_fails times in a row less than retry_ms ago; *wait_ms says for how long it will
 * still be skipped. When that time is over one caller is told to try alone, and the others go on
 * skipping until it has reported or released, or until deadline_ms, which its try may take, is
 * over. */
#define HANDOFF_TRY_ALONE 2
int handoff_status_may_try(const handoff_declared_target *target, int deadline_ms, int *wait_ms);

/* Who tries alone did not find out how the target is: the request was not fit for it. */
void handoff_status_release(const handoff_declared_target *target);

/* The caller reports how its try went. Returns 1 for the one call that changes something for the
 * others: from here on the target is skipped, or is tried again; so that it is logged once. */
int handoff_status_report(const handoff_declared_target *target, int worked);

/* A row as it is now; all zero where there is no memory. */
void handoff_status_read(const handoff_declared_target *target, handoff_row_values *values);

/* When counting began, seconds since 1970. */
apr_int64_t handoff_status_since(void);

/* The handler of the page (handoff_status_page.c). */
int handoff_status_page(request_rec *r);

#endif
