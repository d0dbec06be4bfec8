/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_filter.h"

#include "apr_poll.h"
#include "apr_strings.h"
#include "http_config.h"
#include "http_core.h"
#include "http_log.h"
#include "http_protocol.h"
#include "http_request.h"
#include "http_ssl.h"
#include "http_connection.h"
#include "util_filter.h"

#include <errno.h>
#include <string.h>

#include "handoff_config.h"
#include "handoff_detach.h"
#include "handoff_target.h"
#include "handoff_wire.h"

APLOG_USE_MODULE(socket_handoff);

/* How much of a request body that the application left unread is read and thrown away. Whatever
 * stayed in the socket would be the daemon's to read, with its beginning missing. */
#define DRAIN_MAX_BYTES (1024 * 1024)
#define DRAIN_MAX_TIME apr_time_from_sec(3)

/* A daemon that restarts is back sooner; browsers and load balancers take whole seconds. */
#define RETRY_AFTER_SECONDS "2"

/* Not an HTTP status: there is nobody left to answer. */
#define CLIENT_GONE (-1)

typedef enum {
    STATE_DECIDE,                 /* nothing of the response seen yet                             */
    STATE_COLLECT,                /* throwing the body away until EOS                             */
    STATE_ACT,                    /* at EOS, with our own calls into httpd under way              */
    STATE_DONE                    /* handed off or answered; throwing everything away             */
} take_state;

/* Of one request, in its pool: needed until its last brigade, and the strings are its headers. */
typedef struct {
    take_state state;
    const char *may_not_ask;      /* why this handler's headers are ignored, or NULL              */
    const char *path;             /* as the application wrote it                                  */
    const char *data;             /* never NULL after the decision                                */
    handoff_target target;        /* points into path                                             */
    int error;                    /* HTTP status to answer at EOS instead of handing off, or 0    */
} take_ctx;

static ap_filter_rec_t *take_handle;
static ap_filter_rec_t *strip_handle;

/* --- headers ------------------------------------------------------------------------------- */

static void remove_headers(request_rec *r)
{
    apr_table_unset(r->headers_out, HANDOFF_HEADER_TARGET);
    apr_table_unset(r->headers_out, HANDOFF_HEADER_DATA);
    apr_table_unset(r->err_headers_out, HANDOFF_HEADER_TARGET);
    apr_table_unset(r->err_headers_out, HANDOFF_HEADER_DATA);
}

/* CGI and FastCGI handlers leave an application's headers in err_headers_out, others in
 * headers_out; httpd prefers the former when it writes the response, so do we. */
static const char *get_header(const request_rec *r, const char *name)
{
    const char *value = apr_table_get(r->err_headers_out, name);

    return value != NULL ? value : apr_table_get(r->headers_out, name);
}

static void set_result(request_rec *r, const char *result)
{
    apr_table_setn(r->notes, HANDOFF_NOTE_RESULT, result);
}

/* --- who may ask ----------------------------------------------------------------------------- */

/* "proxy:fcgi://...", or "proxy:unix:/run/php/php-fpm.sock|fcgi://..." */
static int is_fastcgi(const char *name)
{
    const char *scheme = name + strlen("proxy:");

    if (!ap_cstr_casecmpn(scheme, "unix:", 5)) {
        scheme = strchr(scheme, '|');
        if (scheme == NULL) {
            return 0;
        }
        scheme++;
    }
    return !ap_cstr_casecmpn(scheme, "fcgi://", 7);
}

/* Asked before the handler runs, because mod_proxy_fcgi changes r->filename while it does. */
static const char *why_may_not_ask(const request_rec *r)
{
    const char *handler = r->handler != NULL ? r->handler : "";
    const char *backend = NULL;

    if (r->main != NULL) {
        return "it came from a subrequest; let the page itself hand off, not what it includes";
    }
    if (!handoff_dir_config_of(r)->enabled) {
        return "SocketHandoffEnabled is Off here; set it to On for this location";
    }
    if (!strcmp(handler, "send-as-is")) {
        /* A file whose author wrote both the headers and the .htaccess that lets them speak. */
        return "it came from a file (mod_asis); only applications may hand off";
    }
    if (!strncmp(handler, "proxy:", 6)) {
        backend = handler;
    }
    else if (r->proxyreq != PROXYREQ_NONE || !strcmp(handler, "proxy-server")) {
        backend = r->filename != NULL ? r->filename : "";
    }
    if (backend != NULL
        && (r->proxyreq == PROXYREQ_PROXY || strncmp(backend, "proxy:", 6) != 0
            || !is_fastcgi(backend))) {
        return "it came from a proxied backend; of those only FastCGI ones (fcgi://) may hand off, "
               "and not through a balancer";
    }
    return NULL;
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

static int refuse_connection(request_rec *r)
{
    conn_rec *c = r->connection;
    const ap_filter_t *f;

    if (c->master != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks HTTP/2, "
                      "whose connection carries other streams; write \"Protocols http/1.1\" in "
                      "this virtual host");
        set_result(r, "refused-http2");
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    if (ap_ssl_conn_is_ssl(c)) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks TLS to "
                      "this server and a daemon would answer it in plain text; terminate TLS in a "
                      "load balancer in front of this virtual host");
        set_result(r, "refused-tls");
        return HTTP_INTERNAL_SERVER_ERROR;
    }
    for (f = c->output_filters; f != NULL; f = f->next) {
        if (!is_transparent(f)) {
            ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the connection filter "
                          "\"%s\" would be bypassed; disable the module that adds it in this "
                          "virtual host", f->frec->name);
            set_result(r, "refused-filter");
            return HTTP_INTERNAL_SERVER_ERROR;
        }
    }
    if (r->assbackwards) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the client speaks HTTP/0.9, "
                      "which knows no headers; write \"HttpProtocolOptions Require1.0\" to refuse "
                      "such clients altogether");
        set_result(r, "refused-http09");
        return HTTP_VERSION_NOT_SUPPORTED;
    }
    return 0;
}

static int refuse_path(request_rec *r, take_ctx *ctx)
{
    handoff_target_policy policy = handoff_policy_of(handoff_server_config_of(r->server));
    handoff_path_verdict verdict = handoff_target_resolve(ctx->path, &policy, &ctx->target);

    if (verdict == HANDOFF_PATH_OK) {
        return 0;
    }
    ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the path \"%s\" in "
                  HANDOFF_HEADER_TARGET " %s; name the daemon's socket below a "
                  "SocketHandoffAllowedPrefix", ctx->path, handoff_path_reason(verdict));
    set_result(r, "refused-path");
    return HTTP_FORBIDDEN;
}

/* --- the three steps before the client is sent ----------------------------------------------- */

/* Reads what is left of the request body. Non-blocking reads and poll, because a blocking read can
 * be stretched far beyond any timeout by a client that sends a chunk header byte by byte. */
static int drain_request_body(request_rec *r, const take_ctx *ctx)
{
    apr_time_t deadline = apr_time_now() + DRAIN_MAX_TIME;
    apr_bucket_brigade *bb;
    apr_off_t total = 0;
    int status = 0;

    if (r->expecting_100) {
        /* Nobody said "100 Continue": the client has not sent its body, and will not. */
        return 0;
    }
    bb = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    while (status == 0) {
        apr_status_t rv = ap_get_brigade(r->proto_input_filters, bb, AP_MODE_READBYTES,
                                         APR_NONBLOCK_READ, HUGE_STRING_LEN);

        if (ctx->error != 0) {
            /* The input filters answer some errors by themselves: they send an error bucket down
             * the output filters, of which ours is the first, and report success or the end. */
            status = ctx->error;
        }
        else if (APR_STATUS_IS_EAGAIN(rv) || (rv == APR_SUCCESS && APR_BRIGADE_EMPTY(bb))) {
            apr_interval_time_t left = deadline - apr_time_now();
            apr_pollfd_t pfd = { .p = r->pool, .desc_type = APR_POLL_SOCKET,
                                 .reqevents = APR_POLLIN };
            apr_int32_t n = 0;

            pfd.desc.s = ap_get_conn_socket(r->connection);
            rv = left > 0 ? apr_poll(&pfd, 1, &n, left) : APR_TIMEUP;
            if (APR_STATUS_IS_TIMEUP(rv)) {
                status = HTTP_REQUEST_TIME_OUT;
                ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: %" APR_OFF_T_FMT
                              " bytes of a request body that the application did not read came in "
                              "%d s, and not its end; let the application read its request before "
                              "it hands off", total, (int)apr_time_sec(DRAIN_MAX_TIME));
            }
            else if (rv != APR_SUCCESS && !APR_STATUS_IS_EINTR(rv)) {
                status = CLIENT_GONE;
            }
        }
        else if (rv != APR_SUCCESS) {
            status = r->connection->aborted || APR_STATUS_IS_ECONNRESET(rv)
                     || APR_STATUS_IS_ECONNABORTED(rv)
                     ? CLIENT_GONE : ap_map_http_request_error(rv, HTTP_BAD_REQUEST);
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
    if (status != 0) {
        set_result(r, status == CLIENT_GONE ? "client-gone" : "refused-body");
    }
    return status;
}

/* Writes out what earlier, pipelined requests left in the connection's filters; after the handoff
 * it could not be written any more. */
static int flush_connection(request_rec *r)
{
    conn_rec *c = r->connection;
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, c->bucket_alloc);
    apr_status_t rv;

    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_flush_create(c->bucket_alloc));
    rv = ap_pass_brigade(c->output_filters, bb);
    apr_brigade_destroy(bb);
    if (rv != APR_SUCCESS || c->aborted) {
        ap_log_rerror(APLOG_MARK, APLOG_INFO, rv, r, "the client left before its handoff");
        set_result(r, "client-gone");
        return CLIENT_GONE;
    }
    return 0;
}

static int open_target(void *baton)
{
    return handoff_target_open(baton);
}

/* --- what went wrong, for the client, the access log and the operator ------------------------- */

typedef struct {
    handoff_wire_outcome outcome;
    int error;                    /* errno, or 0 for any                                          */
    int status;
    const char *result;
    const char *advice;
} failure;

static const failure failures[] = {
    { HANDOFF_WIRE_OPEN_FAILED, ELOOP, HTTP_FORBIDDEN, "refused-path",
      "a symlink lies on the way; name the socket itself" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOTSOCK, HTTP_FORBIDDEN, "refused-path",
      "that is not a socket; name the daemon's socket" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOTDIR, HTTP_FORBIDDEN, "refused-path",
      "the way leads through something that is no directory; name the daemon's socket" },
    { HANDOFF_WIRE_OPEN_FAILED, ENOENT, HTTP_SERVICE_UNAVAILABLE, "no-daemon",
      "there is no such socket; start the daemon or its systemd socket unit" },
    { HANDOFF_WIRE_OPEN_FAILED, EACCES, HTTP_SERVICE_UNAVAILABLE, "no-permission",
      "Apache's user may not search the socket's directory; allow it to" },
    { HANDOFF_WIRE_CONNECT_FAILED, ECONNREFUSED, HTTP_SERVICE_UNAVAILABLE, "no-daemon",
      "nobody listens on the socket; start the daemon or its systemd socket unit" },
    { HANDOFF_WIRE_CONNECT_FAILED, EAGAIN, HTTP_SERVICE_UNAVAILABLE, "daemon-busy",
      "the daemon's backlog stayed full; see whether it hangs, or raise its backlog" },
    { HANDOFF_WIRE_CONNECT_FAILED, EACCES, HTTP_SERVICE_UNAVAILABLE, "no-permission",
      "Apache's user may not write to the socket; set its group and mode (SocketGroup=, "
      "SocketMode=0660)" },
    { HANDOFF_WIRE_CONNECT_FAILED, EPROTOTYPE, HTTP_SERVICE_UNAVAILABLE, "no-daemon",
      "the daemon listens on a datagram socket; let it listen on SOCK_SEQPACKET" },
    { HANDOFF_WIRE_CONNECT_FAILED, ENOENT, HTTP_SERVICE_UNAVAILABLE, "no-proc",
      "/proc is missing, sockets are reached through /proc/self/fd; mount it for Apache" },
    { HANDOFF_WIRE_SEND_FAILED, ETOOMANYREFS, HTTP_SERVICE_UNAVAILABLE, "daemon-busy",
      "too many descriptors wait for the daemon to receive them; see whether it hangs, or raise "
      "Apache's LimitNOFILE" },
    { HANDOFF_WIRE_SEND_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, "daemon-failed",
      "the daemon accepted the connection and took no message; see its log" },
    { HANDOFF_WIRE_TOO_LARGE, 0, HTTP_INTERNAL_SERVER_ERROR, "too-large",
      "the message is too large; put the data where the daemon can fetch it and pass the key" },
    { HANDOFF_WIRE_LOCAL_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, "no-resources",
      "no socket could be made; raise Apache's LimitNOFILE" },
};

static const failure *find_failure(handoff_wire_outcome outcome, int error)
{
    static const failure other = {
        HANDOFF_WIRE_CONNECT_FAILED, 0, HTTP_SERVICE_UNAVAILABLE, "no-daemon",
        "the socket cannot be reached; see whether the daemon runs"
    };
    size_t i;

    for (i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
        if (failures[i].outcome == outcome
            && (failures[i].error == 0 || failures[i].error == error)) {
            return &failures[i];
        }
    }
    return &other;
}

static int report_failure(request_rec *r, const take_ctx *ctx, handoff_wire_outcome outcome,
                          const handoff_wire_report *report)
{
    const failure *why = find_failure(outcome, report->error);

    if (outcome == HANDOFF_WIRE_TOO_LARGE) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(report->error), r,
                      "handoff to %s failed: %s (" HANDOFF_HEADER_DATA " has %" APR_SIZE_T_FMT
                      " bytes, %" APR_SIZE_T_FMT " fit)", ctx->path, why->advice,
                      strlen(ctx->data), report->limit);
    }
    else {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(report->error), r,
                      "handoff to %s failed: %s (%d attempt%s, %ld ms)", ctx->path, why->advice,
                      report->attempts, report->attempts == 1 ? "" : "s",
                      report->elapsed_us / 1000);
    }
    set_result(r, why->result);
    return why->status;
}

/* --- the end of a request ---------------------------------------------------------------------- */

/* Gives the client to the daemon. Returns 0 when the client is no longer httpd's, an HTTP status
 * to answer, or CLIENT_GONE. */
static int hand_off(request_rec *r, take_ctx *ctx)
{
    const handoff_server_config *config = handoff_server_config_of(r->server);
    handoff_wire_message message;
    handoff_wire_order order;
    handoff_wire_report report;
    handoff_wire_outcome outcome;
    handoff_detach detach;
    apr_status_t rv;
    int status;

    status = drain_request_body(r, ctx);
    if (status == 0) {
        status = flush_connection(r);
    }
    if (status != 0) {
        return status;
    }

    rv = handoff_detach_prepare(&detach, r->connection);
    if (rv != APR_SUCCESS) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, rv, r, "handoff to %s failed: no socket could be made "
                      "to take the client's place; raise Apache's LimitNOFILE", ctx->path);
        set_result(r, "no-resources");
        return HTTP_SERVICE_UNAVAILABLE;
    }

    handoff_wire_plain(&message, ctx->data, strlen(ctx->data), detach.client_fd);
    order.open_name = open_target;
    order.baton = &ctx->target;
    order.connect_timeout_ms = config->connect_timeout_ms;
    order.send_timeout_ms = config->send_timeout_ms;
    order.max_retries = config->max_retries;
    outcome = handoff_wire_deliver(&message, &order, &report);

    if (outcome != HANDOFF_WIRE_SENT && outcome != HANDOFF_WIRE_SENT_SHORT) {
        handoff_detach_abandon(&detach);
        return report_failure(r, ctx, outcome, &report);
    }

    rv = handoff_detach_commit(&detach);
    if (rv != APR_SUCCESS) {
        ap_log_rerror(APLOG_MARK, APLOG_CRIT, rv, r, "handoff to %s: Apache could not let go of "
                      "the client; the connection is closed instead", ctx->path);
    }
    if (outcome == HANDOFF_WIRE_SENT_SHORT) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(report.error), r, "handoff to %s: "
                      "the daemon took the client but not the whole message; see its log",
                      ctx->path);
    }
    ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "client handed to %s in %ld us, %" APR_SIZE_T_FMT
                  " bytes of data, %s", ctx->path, report.elapsed_us, strlen(ctx->data),
                  report.is_stream ? "stream" : "seqpacket");
    set_result(r, outcome == HANDOFF_WIRE_SENT ? "sent" : "sent-short");
    return 0;
}

/* Answers in the application's place. The headers that describe its body go with the body. */
static void answer_error(request_rec *r, int status)
{
    static const char *const of_the_body[] = {
        "Content-Length", "Content-Encoding", "Content-Range", "Content-MD5", "ETag",
        "Last-Modified", "Transfer-Encoding"
    };
    const char *result = apr_table_get(r->notes, HANDOFF_NOTE_RESULT);
    request_rec *next;
    size_t i;

    for (i = 0; i < sizeof(of_the_body) / sizeof(of_the_body[0]); i++) {
        apr_table_unset(r->headers_out, of_the_body[i]);
        apr_table_unset(r->err_headers_out, of_the_body[i]);
    }
    if (status == HTTP_SERVICE_UNAVAILABLE) {
        /* err_headers_out is what survives into an ErrorDocument. */
        apr_table_setn(r->err_headers_out, "Retry-After", RETRY_AFTER_SECONDS);
    }

    /* ap_die takes any status but 200 for an earlier error, and then shows no ErrorDocument. What
     * the application said about its response is void; but while an ErrorDocument is being made
     * the status really is an earlier error's, and must stay to end the recursion. */
    if (r->prev == NULL || r->prev->status == HTTP_OK) {
        r->status = HTTP_OK;
    }
    r->status_line = NULL;
    ap_die(status, r);

    for (next = r->next; next != NULL; next = next->next) {
        apr_table_setn(next->notes, HANDOFF_NOTE_TARGET,
                       apr_table_get(r->notes, HANDOFF_NOTE_TARGET));
        apr_table_setn(next->notes, HANDOFF_NOTE_RESULT, result);
    }
}

static void finish(request_rec *r, take_ctx *ctx)
{
    int status = ctx->error != 0 ? ctx->error : hand_off(r, ctx);

    if (status > 0) {
        answer_error(r, status);
        return;
    }
    if (status == CLIENT_GONE) {
        r->connection->keepalive = AP_CONN_CLOSE;
    }
    /* For the access log: whatever a handler counted, none of it went to the client. */
    r->bytes_sent = 0;
}

/* --- the filters ------------------------------------------------------------------------------ */

/* Looks at the headers, once. Returns whether the body is ours to throw away. */
static int decide(request_rec *r, take_ctx *ctx)
{
    const char *path = get_header(r, HANDOFF_HEADER_TARGET);
    const char *data = get_header(r, HANDOFF_HEADER_DATA);

    if (path == NULL && data == NULL) {
        return 0;
    }
    remove_headers(r);
    if (path == NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, HANDOFF_HEADER_DATA " without "
                      HANDOFF_HEADER_TARGET " is removed");
        return 0;
    }
    if (ctx->may_not_ask != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, r, HANDOFF_HEADER_TARGET " is ignored: %s",
                      ctx->may_not_ask);
        set_result(r, "ignored");
        return 0;
    }
    if (r->header_only) {
        /* The plain message cannot tell the daemon that this is HEAD; it would send a body. */
        ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "HEAD is answered without a handoff");
        set_result(r, "head");
        return 0;
    }
    ctx->path = path;
    ctx->data = data != NULL ? data : "";
    apr_table_setn(r->notes, HANDOFF_NOTE_TARGET, path);
    ctx->error = refuse_connection(r);
    if (ctx->error == 0) {
        ctx->error = refuse_path(r, ctx);
    }
    return 1;
}

/* Throws the brigade away; returns whether the application's output has ended. */
static int collect(request_rec *r, take_ctx *ctx, apr_bucket_brigade *bb)
{
    int at_end = 0;

    while (!APR_BRIGADE_EMPTY(bb)) {
        apr_bucket *e = APR_BRIGADE_FIRST(bb);
        int failed = 0;

        if (APR_BUCKET_IS_EOS(e)) {
            at_end = 1;
        }
        else if (AP_BUCKET_IS_ERROR(e)) {
            failed = ((ap_bucket_error *)e->data)->status;
        }
        else if (AP_BUCKET_IS_EOC(e)) {
            failed = HTTP_BAD_GATEWAY;
        }
        else if (!APR_BUCKET_IS_METADATA(e) && e->length == (apr_size_t)-1) {
            /* A pipe or socket: reading it to its end lets the application finish, where closing
             * it would kill the application in the middle of its work. */
            const char *data;
            apr_size_t length;

            if (apr_bucket_read(e, &data, &length, APR_BLOCK_READ) != APR_SUCCESS) {
                failed = HTTP_BAD_GATEWAY;
            }
        }
        if (failed != 0 && ctx->error == 0) {
            ap_log_rerror(APLOG_MARK, APLOG_INFO, 0, r, "the %s failed after a handoff to %s was "
                          "asked for; the client is answered with %d",
                          ctx->state == STATE_COLLECT ? "application" : "request's body",
                          ctx->path, failed);
            set_result(r, "application-failed");
            ctx->error = failed;
        }
        apr_bucket_delete(e);
    }
    return at_end;
}

static apr_status_t take_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    request_rec *r = f->r;
    take_ctx *ctx = f->ctx;

    if (ctx->state == STATE_DECIDE) {
        if (APR_BRIGADE_EMPTY(bb)) {
            return APR_SUCCESS;
        }
        if (!decide(r, ctx)) {
            ap_remove_output_filter(f);
            return ap_pass_brigade(f->next, bb);
        }
        ctx->state = STATE_COLLECT;
    }
    if (ctx->state == STATE_COLLECT) {
        if (collect(r, ctx, bb)) {
            ctx->state = STATE_ACT;
            finish(r, ctx);
            ctx->state = STATE_DONE;
        }
    }
    else if (ctx->state == STATE_ACT) {
        collect(r, ctx, bb);
    }
    else {
        apr_brigade_cleanup(bb);
    }

    /* Never an error: a handler that is told of one answers it too, and the client would see two
     * responses. */
    return APR_SUCCESS;
}

/* Some headers arrive without passing the take filter: from mod_headers, and with the errors for
 * which httpd drops the filters of the response. */
static apr_status_t strip_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    remove_headers(f->r);
    ap_remove_output_filter(f);
    return ap_pass_brigade(f->next, bb);
}

void handoff_filter_register(void)
{
    take_handle = ap_register_output_filter("SOCKET_HANDOFF", take_filter, NULL,
                                            AP_FTYPE_RESOURCE - 1);
    strip_handle = ap_register_output_filter("SOCKET_HANDOFF_STRIP", strip_filter, NULL,
                                             AP_FTYPE_PROTOCOL - 1);
}

int handoff_forget_request_headers(request_rec *r)
{
    apr_table_unset(r->headers_in, HANDOFF_HEADER_TARGET);
    apr_table_unset(r->headers_in, HANDOFF_HEADER_DATA);
    return DECLINED;
}

void handoff_insert_filters(request_rec *r)
{
    take_ctx *ctx = apr_pcalloc(r->pool, sizeof(*ctx));

    /* Only the handler, which runs next, may ask: not a configuration file of the content's owner
     * (mod_cern_meta), nor the request that failed and led to this ErrorDocument. */
    remove_headers(r);

    ctx->state = STATE_DECIDE;
    ctx->may_not_ask = why_may_not_ask(r);
    ap_add_output_filter_handle(take_handle, ctx, r, r->connection);
    if (r->main == NULL) {
        ap_add_output_filter_handle(strip_handle, NULL, r, r->connection);
    }
}

void handoff_insert_error_filter(request_rec *r)
{
    ap_add_output_filter_handle(strip_handle, NULL, r, r->connection);
}
