/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_VERSION_H
#define HANDOFF_VERSION_H

/* The only place where the module's version is written. */
#define HANDOFF_VERSION "0.1.0"

#endif
