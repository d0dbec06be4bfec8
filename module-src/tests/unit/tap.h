/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef TAP_H
#define TAP_H

/* Enough of the Test Anything Protocol: ok() per promise, tap_end() as main's result. */

#include <stdarg.h>
#include <stdio.h>

static int tap_count;
static int tap_failed;

__attribute__((format(printf, 2, 3)))
static int ok(int passed, const char *promise, ...)
{
    va_list args;

    tap_count++;
    if (!passed) {
        tap_failed++;
    }
    printf("%sok %d - ", passed ? "" : "not ", tap_count);
    va_start(args, promise);
    vprintf(promise, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    return passed;
}

static int tap_end(void)
{
    printf("1..%d\n# %d passed, %d failed\n", tap_count, tap_count - tap_failed, tap_failed);
    return tap_failed == 0 ? 0 : 1;
}

#endif
