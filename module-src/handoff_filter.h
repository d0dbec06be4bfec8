/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#ifndef HANDOFF_FILTER_H
#define HANDOFF_FILTER_H

/*
 * The life of one request. Two output filters are added to each:
 *
 *   take   is the first filter that the handler's output meets. It decides, and hands off.
 *   strip  is the last one before the headers are written. It only removes our headers.
 *
 *            first brigade, no header,
 *            or asked by one who may not      take leaves the chain; the response goes on as usual
 *   DECIDE ──────────────────────────────▶ (gone)
 *      │     asked and permitted,                              EOS
 *      │     or asked and refused
 *      └──────────────────────────────▶ COLLECT ──────────────────▶ ACT ─────────────────▶ DONE
 *                                       body swallowed,             hand off, or answer   whatever
 *                                       handler runs to its end     with the error        comes is
 *                                                                                         dropped
 *
 * Acting at EOS and not at the first byte means that the handler is finished: PHP has closed its
 * session, and nobody reads or writes the client any more. (mod_proxy_fcgi may still find that its
 * application died; what it then answers reaches nobody.)
 */

#include "httpd.h"
#include "util_filter.h"

/* Headers by which an application asks. Removed from every response. */
#define HANDOFF_HEADER_TARGET "X-Socket-Handoff"
#define HANDOFF_HEADER_DATA "X-Handoff-Data"
#define HANDOFF_HEADER_DATA_FROM "X-Handoff-Data-From"

/* Its only value: the data is the body that the application writes. */
#define HANDOFF_DATA_FROM_BODY "response-body"

void handoff_filter_register(void);

/* Hooks, in the order in which a request meets them. */
int handoff_forget_request_headers(request_rec *r);
void handoff_insert_filters(request_rec *r);
void handoff_insert_error_filter(request_rec *r);

/* An output filter function that passes nothing on. */
apr_status_t handoff_swallow(ap_filter_t *f, apr_bucket_brigade *bb);

#endif
