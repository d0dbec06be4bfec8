/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_result.h"

const char *handoff_result_name(handoff_result result)
{
#define HANDOFF_RESULT_WORD(constant, word) word,
    static const char *const names[] = { HANDOFF_RESULTS(HANDOFF_RESULT_WORD) };
#undef HANDOFF_RESULT_WORD

    return result >= 0 && result < HANDOFF_RESULT_COUNT ? names[result] : "unknown";
}
