/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_request.h"

#include "apr_poll.h"
#include "apr_strings.h"
#include "http_connection.h"
#include "http_core.h"
#include "http_log.h"
#include "http_protocol.h"
#include "http_request.h"
#include "http_ssl.h"
#include "util_filter.h"

#include <errno.h>
#include <string.h>

#include "handoff_config.h"
#include "handoff_origin.h"

APLOG_USE_MODULE(socket_handoff);

/* How much of a request body that the application left unread is read and thrown away. Whatever
 * stayed in the socket would be the daemon's to read, with its beginning missing. */
#define DRAIN_MAX_BYTES 1048576      /* 1 MiB */
#define DRAIN_MAX_TIME apr_time_from_sec(3)

/* More than httpd can have read ahead: it has a buffer per read, of 8000 bytes. */
#define PREFETCH_MOST 1073741824

/* mod_reqtimeout watches the clock only when it is asked for more. */
#define LOOK_AGAIN apr_time_from_msec(250)

/* --- who may ask ----------------------------------------------------------------------------- */

const char *handoff_why_may_not_ask(const request_rec *r)
{
    handoff_origin_names names;

    if (r->main != NULL) {
        return "it came from a subrequest; let the page itself hand off, not what it includes";
    }
    if (!handoff_dir_config_of(r)->enabled) {
        return "SocketHandoffEnabled is Off here; set it to On for this location";
    }
    names.handler = r->handler;
    names.content_type = r->content_type;
    names.filename = r->filename;
    names.is_proxied = r->proxyreq != PROXYREQ_NONE;
    names.is_forward = r->proxyreq == PROXYREQ_PROXY;
    switch (handoff_origin_of(&names)) {
    case HANDOFF_ORIGIN_APPLICATION:
        return NULL;
    case HANDOFF_ORIGIN_FILE:
        return "it came from a file (mod_asis); only applications may hand off";
    case HANDOFF_ORIGIN_CLIENT:
        return "it came from the client (mod_reflector); only applications may hand off";
    case HANDOFF_ORIGIN_BACKEND:
        break;
    }
    return "it came from a proxied backend; of those only FastCGI ones (fcgi://) may hand off, "
           "and not through a balancer";
}

/* --- which connections can be given away ----------------------------------------------------- */

/* Filters that leave the bytes on the wire as they are. Any other one may encrypt, compress or
 * record them, and a daemon that writes to the bare socket would go behind its back. */
static int is_transparent(const ap_filter_t *f)
{
    static const char *const known[] = {
        "core", "log_input_output", "logio_ttfb_out", "reqtimeout"
    };
    size_t i;

    for (i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (!ap_cstr_casecmp(f->frec->name, known[i])) {
            return 1;
        }
    }
    return 0;
}

int handoff_refuse_connection(request_rec *r, handoff_result *result)
{
    conn_rec *c = r->connection;
    const ap_filter_t *f;

    if (c->master != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks HTTP/2, "
                      "whose connection carries other streams; write \"Protocols http/1.1\" in "
                      "this virtual host");
        *result = HANDOFF_REFUSED_HTTP2;
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    if (ap_ssl_conn_is_ssl(c)) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks TLS to "
                      "this server and a daemon would answer it in plain text; terminate TLS in a "
                      "load balancer in front of this virtual host");
        *result = HANDOFF_REFUSED_TLS;
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    for (f = c->output_filters; f != NULL; f = f->next) {
        if (!is_transparent(f)) {
            ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the connection filter "
                          "\"%s\" would be bypassed; disable the module that adds it in this "
                          "virtual host", f->frec->name);
            *result = HANDOFF_REFUSED_FILTER;
            return HTTP_INTERNAL_SERVER_ERROR;
        }
    }
    if (r->assbackwards) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks HTTP/0.9, "
                      "which knows no headers; write \"HttpProtocolOptions Require1.0\" to refuse "
                      "such clients altogether");
        *result = HANDOFF_REFUSED_HTTP09;
        return HTTP_VERSION_NOT_SUPPORTED;
    }
    return 0;
}

/* --- before the client is sent ----------------------------------------------------------------- */

/* Whether anything behind the request's head has arrived. */
static int more_has_come(request_rec *r)
{
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    apr_off_t length = 0;

    if (ap_get_brigade(r->connection->input_filters, bb, AP_MODE_SPECULATIVE, APR_NONBLOCK_READ, 1)
        == APR_SUCCESS) {
        apr_brigade_length(bb, 1, &length);
    }
    apr_brigade_destroy(bb);
    return length > 0;
}

/* Non-blocking reads and poll, because a blocking read can
 * be stretched far beyond any timeout by a client that sends a chunk header byte by byte. */
int handoff_drain_body(request_rec *r, const int *interrupted, handoff_result *result)
{
    apr_time_t deadline = apr_time_now() + DRAIN_MAX_TIME;
    apr_bucket_brigade *bb;
    apr_off_t total = 0;
    int status = 0;

    if (r->expecting_100) {
        if (!more_has_come(r)) {
            /* Nobody said "100 Continue": the client has not sent its body, and will not. */
            return 0;
        }
        /* It need not wait for that (RFC 9110 10.1.1), and did not. Its body is one like any other,
         * and to one that has begun no "100 Continue" is said. */
        r->expecting_100 = 0;
    }
    bb = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    while (status == 0) {
        apr_status_t rv = ap_get_brigade(r->proto_input_filters, bb, AP_MODE_READBYTES,
                                         APR_NONBLOCK_READ, HUGE_STRING_LEN);

        if (*interrupted != 0) {
            /* The input filters answer some errors by themselves: they send an error bucket down
             * the output filters, of which ours is the first, and report success or the end. */
            status = *interrupted;
        }
        else if (APR_STATUS_IS_EAGAIN(rv) || (rv == APR_SUCCESS && APR_BRIGADE_EMPTY(bb))) {
            apr_interval_time_t left = deadline - apr_time_now();
            apr_pollfd_t pfd = { .p = r->pool, .desc_type = APR_POLL_SOCKET,
                                 .reqevents = APR_POLLIN };
            apr_int32_t n = 0;

            pfd.desc.s = ap_get_conn_socket(r->connection);
            rv = left > 0 ? apr_poll(&pfd, 1, &n, left < LOOK_AGAIN ? left : LOOK_AGAIN)
                          : APR_TIMEUP;
            if (APR_STATUS_IS_TIMEUP(rv) && left > LOOK_AGAIN) {
                continue;
            }
            if (APR_STATUS_IS_TIMEUP(rv)) {
                status = HTTP_REQUEST_TIME_OUT;
                ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: %" APR_OFF_T_FMT
                              " bytes of a request body that the application did not read came in "
                              "%d s, and not its end; let the application read its request before "
                              "it hands off", total, (int)apr_time_sec(DRAIN_MAX_TIME));
            }
            else if (rv != APR_SUCCESS && !APR_STATUS_IS_EINTR(rv)) {
                status = HANDOFF_CLIENT_LEFT;
            }
        }
        else if (rv != APR_SUCCESS) {
            status = r->connection->aborted || APR_STATUS_IS_ECONNRESET(rv)
                     || APR_STATUS_IS_ECONNABORTED(rv)
                     ? HANDOFF_CLIENT_LEFT : ap_map_http_request_error(rv, HTTP_BAD_REQUEST);
            ap_log_rerror(APLOG_MARK, APLOG_INFO, rv, r, "handoff refused: the rest of the request "
                          "body could not be read");
        }
        else {
            apr_off_t length = 0;
            int at_end = APR_BUCKET_IS_EOS(APR_BRIGADE_LAST(bb));

            apr_brigade_length(bb, 1, &length);
            apr_brigade_cleanup(bb);
            total += length;
            if (total > DRAIN_MAX_BYTES) {
                status = HTTP_REQUEST_ENTITY_TOO_LARGE;
                ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the application left "
                              "more than %d bytes of the request body unread; let it read its "
                              "request before it hands off, or limit requests by LimitRequestBody",
                              DRAIN_MAX_BYTES);
            }
            else if (at_end) {
                break;
            }
        }
    }
    apr_brigade_destroy(bb);
    ap_log_rerror(APLOG_MARK, APLOG_TRACE2, 0, r, "%" APR_OFF_T_FMT " bytes of the request's body "
                  "were left unread", total);
    if (status != 0) {
        *result = status == HANDOFF_CLIENT_LEFT ? HANDOFF_CLIENT_GONE : HANDOFF_REFUSED_BODY;
    }
    return status;
}

int handoff_flush_connection(request_rec *r, handoff_result *result)
{
    conn_rec *c = r->connection;
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, c->bucket_alloc);
    apr_status_t rv;

    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_flush_create(c->bucket_alloc));
    rv = ap_pass_brigade(c->output_filters, bb);
    apr_brigade_destroy(bb);
    if (rv != APR_SUCCESS || c->aborted) {
        ap_log_rerror(APLOG_MARK, APLOG_INFO, rv, r, "the client left before its handoff");
        *result = HANDOFF_CLIENT_GONE;
        return HANDOFF_CLIENT_LEFT;
    }
    return 0;
}

apr_int64_t handoff_unread_body(const request_rec *r)
{
    const char *length = apr_table_get(r->headers_in, "Content-Length");
    apr_off_t bytes;

    if (!r->expecting_100) {
        return 0;
    }
    return length != NULL && ap_parse_strict_length(&bytes, length) ? (apr_int64_t)bytes : -1;
}

apr_size_t handoff_prefetched(request_rec *r, const handoff_detach *detach)
{
    conn_rec *c = r->connection;
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, c->bucket_alloc);
    apr_off_t length = 0;
    apr_status_t rv;

    /* Speculative: what is there is looked at and stays. Where that is less than was asked for,
     * which it always is, httpd's filter reads on from the socket: those bytes would be taken from
     * the daemon. So it does not get to see the socket meanwhile. */
    handoff_detach_hide(detach);
    rv = ap_get_brigade(c->input_filters, bb, AP_MODE_SPECULATIVE, APR_NONBLOCK_READ, PREFETCH_MOST);
    handoff_detach_show(detach);
    if (rv == APR_SUCCESS) {
        apr_brigade_length(bb, 0, &length);
    }
    apr_brigade_destroy(bb);
    return length > 0 ? (apr_size_t)length : 0;
}
