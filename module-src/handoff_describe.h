/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_DESCRIBE_H
#define HANDOFF_DESCRIBE_H

/*
 * Describes a request to a daemon: fills the message that a target wants from the request_rec. The
 * counterpart of handoff_envelope, which knows the form but not httpd.
 */

#include "httpd.h"

#include "handoff_deliver.h"
#include "handoff_detach.h"
#include "handoff_wire.h"

/* Data up to this size stands in the envelope, larger data goes beside it. Well below what a
 * socket takes by default (net.core.wmem_default, 212,992), so that headers have room too. */
#define HANDOFF_INLINE_DATA_MAX 65536

/* Data also goes beside an envelope that would become larger than this, or than a socket takes where
 * somebody made that less. */
#define HANDOFF_ENVELOPE_COMFORT 131072

/* Lets mod_session do its work, once for each wish: on the request's own headers, so that an answer of
 * httpd's own, when the handoff fails, has its cookie too. */
void handoff_save_session(request_rec *r);

/* Builds the message for one target (NULL: an undeclared path); its bytes are in the request's
 * pool, its descriptors stay the wish's. Returns 0, or the HTTP status to answer with, which is
 * then logged, and *result what to count. */
int handoff_describe(request_rec *r, handoff_wish *wish, const handoff_declared_target *target,
                     const handoff_detach *detach, handoff_wire_message *message, handoff_result *result);

#endif
