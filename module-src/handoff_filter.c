/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_filter.h"

#include "apr_strings.h"
#include "http_config.h"
#include "http_connection.h"
#include "http_core.h"
#include "http_log.h"
#include "http_protocol.h"
#include "http_request.h"
#include "util_filter.h"

#include <stdatomic.h>
#include <string.h>

#include "handoff_config.h"
#include "handoff_deliver.h"
#include "handoff_detach.h"
#include "handoff_payload.h"
#include "handoff_request.h"
#include "handoff_status.h"
#include "handoff_target.h"

APLOG_USE_MODULE(socket_handoff);

typedef enum {
    STATE_DECIDE,                 /* nothing of the response seen yet                             */
    STATE_COLLECT,                /* swallowing the body until EOS                                */
    STATE_ACT,                    /* at EOS, with our own calls into httpd under way              */
    STATE_DONE                    /* handed off or answered; throwing everything away             */
} take_state;

/* Of one request, in its pool: needed until its last brigade, and the strings are its headers. A
 * request that may ask has none before it does. */
typedef struct {
    take_state state;
    int error;                    /* HTTP status to answer at EOS instead of handing off, or 0    */
    const char *may_not_ask;      /* why this handler's headers are ignored, or NULL              */
    handoff_wish *wish;           /* NULL until one is made                                       */
    apr_off_t max_payload;
    int body_is_data;             /* the body is collected into the wish's memfd                  */
} take_ctx;

static ap_filter_rec_t *take_handle;
static ap_filter_rec_t *strip_handle;
static ap_filter_rec_t *strip_early_handle;

/* Whether mod_cache is there. Read-only once the configuration is read. */
static int cache_is_loaded;

/* --- headers ------------------------------------------------------------------------------- */

/* Whether one of ours may be among them: all begin with "X-S" or "X-H". Nearly every table has none,
 * and one look through it is cheaper than asking for three names. */
static inline int may_have_ours(const apr_table_t *headers)
{
    const apr_array_header_t *all = apr_table_elts(headers);
    const apr_table_entry_t *entry = (const apr_table_entry_t *)all->elts;
    const apr_table_entry_t *end = entry + all->nelts;

    for (; entry < end; entry++) {
        const char *key = entry->key;

        if ((key[0] | 0x20) == 'x' && key[1] == '-'
            && ((key[2] | 0x20) == 's' || (key[2] | 0x20) == 'h')) {
            return 1;
        }
    }
    return 0;
}

/* Where no key begins with an X, apr_table_unset knows it without looking. */
static void remove_headers(apr_table_t *headers)
{
    apr_table_unset(headers, HANDOFF_HEADER_TARGET);
    apr_table_unset(headers, HANDOFF_HEADER_DATA);
    apr_table_unset(headers, HANDOFF_HEADER_DATA_FROM);
}

static __attribute__((noinline)) void remove_from_both(request_rec *r)
{
    remove_headers(r->headers_out);
    remove_headers(r->err_headers_out);
}

static inline void remove_response_headers(request_rec *r)
{
    /* Mostly there is none at all. Not apr_is_empty_table: a call for what apr_table_elts, a macro,
     * reads in two instructions. */
    if (apr_table_elts(r->headers_out)->nelts > 0
        || apr_table_elts(r->err_headers_out)->nelts > 0) {
        remove_from_both(r);
    }
}

/* CGI and FastCGI handlers leave an application's headers in err_headers_out, others in
 * headers_out; httpd prefers the former when it writes the response, so do we. */
static const char *get_header(const request_rec *r, const char *name)
{
    const char *value = apr_table_get(r->err_headers_out, name);

    return value != NULL ? value : apr_table_get(r->headers_out, name);
}

/* --- the end of a request ---------------------------------------------------------------------- */

/* Gives the client to the daemon. Returns 0 when the client is no longer httpd's, an HTTP status
 * to answer, or HANDOFF_CLIENT_LEFT. */
static int hand_off(request_rec *r, take_ctx *ctx)
{
    handoff_result result = HANDOFF_CLIENT_GONE;
    int status;

    ctx->wish->began = apr_time_now();
    status = handoff_drain_body(r, &ctx->error, &result);
    if (status == 0) {
        status = handoff_flush_connection(r, &result);
    }
    if (status != 0) {
        handoff_note_result(r, ctx->wish->declared, result);
        return status;
    }
    return handoff_deliver(r, ctx->wish);
}

/* Answers in the application's place. The headers that describe its body go with the body. */
static void answer_error(request_rec *r, int status)
{
    static const char *const of_the_body[] = {
        "Accept-Ranges", "Age", "Cache-Control", "Content-Disposition", "Content-Encoding",
        "Content-Language", "Content-Length", "Content-Location", "Content-MD5", "Content-Range",
        "ETag", "Expires", "Last-Modified", "Pragma", "Surrogate-Control", "Transfer-Encoding"
    };
    size_t i;

    for (i = 0; i < sizeof(of_the_body) / sizeof(of_the_body[0]); i++) {
        apr_table_unset(r->headers_out, of_the_body[i]);
        apr_table_unset(r->err_headers_out, of_the_body[i]);
    }
    /* What the application allowed to be kept was its answer, not that there is none now. */
    apr_table_setn(r->err_headers_out, "Cache-Control", "no-store");
    if (status == HTTP_SERVICE_UNAVAILABLE
        && apr_table_get(r->err_headers_out, "Retry-After") == NULL) {
        apr_table_setn(r->err_headers_out, "Retry-After", "2");
    }

    /* ap_die takes any status but 200 for an earlier error, and then shows no ErrorDocument. What
     * the application said about its response is void; but while an ErrorDocument is being made
     * the status really is an earlier error's, and must stay to end the recursion. */
    if (r->prev == NULL || r->prev->status == HTTP_OK) {
        r->status = HTTP_OK;
    }
    r->status_line = NULL;
    ap_die(status, r);
}

static void finish(request_rec *r, take_ctx *ctx)
{
    int status = ctx->error != 0 ? ctx->error : hand_off(r, ctx);

    if (status > 0) {
        answer_error(r, status);
        return;
    }
    if (status == HANDOFF_CLIENT_LEFT) {
        r->connection->keepalive = AP_CONN_CLOSE;
    }
    /* For the access log: whatever a handler counted, none of it went to the client. */
    r->bytes_sent = 0;
}

/* --- deciding ---------------------------------------------------------------------------------- */

static int refuse(request_rec *r, take_ctx *ctx, handoff_result result, int status)
{
    handoff_note_result(r, ctx->wish->declared, result);
    ctx->error = status;
    return 1;
}

/* Which target is meant, and whether it may be used here. Returns whether it is refused. */
static int refuse_target(request_rec *r, take_ctx *ctx)
{
    handoff_wish *wish = ctx->wish;
    const handoff_declared_target *target;
    handoff_target_policy policy;
    handoff_path_verdict verdict;

    if (handoff_declared_targets()->nelts > 0) {
        target = handoff_find_target(wish->asked);
        if (target == NULL) {
            ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: \"%s\" in "
                          HANDOFF_HEADER_TARGET " is neither the name nor the path of a "
                          "SocketHandoffTarget; name one of them", wish->asked);
            return refuse(r, ctx, HANDOFF_REFUSED_PATH, HTTP_FORBIDDEN);
        }
        if (!handoff_may_use(handoff_dir_config_of(r), target)) {
            ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: applications here may not "
                          "use the target %s; write \"SocketHandoffAllow %s\" for this location if "
                          "they should", target->name, target->name);
            return refuse(r, ctx, HANDOFF_REFUSED_PATH, HTTP_FORBIDDEN);
        }
        wish->declared = target;
        handoff_note(r, HANDOFF_NOTE_TARGET, target->name);
        return 0;
    }

    policy = handoff_policy_of(handoff_server_config_of(r->server));
    verdict = handoff_target_resolve(wish->asked, &policy, &wish->socket);
    if (verdict == HANDOFF_PATH_OK) {
        return 0;
    }
    ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the path \"%s\" in "
                  HANDOFF_HEADER_TARGET " %s; name the daemon's socket below a "
                  "SocketHandoffAllowedPrefix, or declare it as a SocketHandoffTarget",
                  wish->asked, handoff_path_reason(verdict));
    return refuse(r, ctx, HANDOFF_REFUSED_PATH, HTTP_FORBIDDEN);
}

/* How the application has encoded its body (RFC 9110 8.4), or NULL. Filters that do so come later. */
static const char *content_coding(const request_rec *r)
{
    const char *coding = get_header(r, "Content-Encoding");

    if (coding == NULL) {
        coding = r->content_encoding;
    }
    return coding != NULL && ap_cstr_casecmp(coding, "identity") != 0 ? coding : NULL;
}

/* Where the data comes from. Returns whether it is refused. */
static int refuse_data(request_rec *r, take_ctx *ctx, const char *from)
{
    const char *coding;
    int error;

    if (from == NULL) {
        return 0;
    }
    if (ap_cstr_casecmp(from, HANDOFF_DATA_FROM_BODY)) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: " HANDOFF_HEADER_DATA_FROM
                      " is \"%s\", allowed is " HANDOFF_DATA_FROM_BODY "; correct the application",
                      from);
        return refuse(r, ctx, HANDOFF_REFUSED_DATA, HTTP_INTERNAL_SERVER_ERROR);
    }
    if (ctx->wish->data != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the application sent both "
                      HANDOFF_HEADER_DATA " and " HANDOFF_HEADER_DATA_FROM "; let it send one of "
                      "them");
        return refuse(r, ctx, HANDOFF_REFUSED_DATA, HTTP_INTERNAL_SERVER_ERROR);
    }
    coding = content_coding(r);
    if (coding != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff refused: the application's body is to be "
                      "the data and is encoded (Content-Encoding: %s), which the daemon would not "
                      "know; switch that off where it hands off, such as PHP's "
                      "zlib.output_compression", ap_escape_logitem(r->pool, coding));
        return refuse(r, ctx, HANDOFF_REFUSED_DATA, HTTP_INTERNAL_SERVER_ERROR);
    }
    error = handoff_open_payload(r, ctx->wish);
    if (error != 0) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(error), r, "handoff failed: no memfd "
                      "could be made for the data; raise Apache's LimitNOFILE");
        return refuse(r, ctx, HANDOFF_NO_RESOURCES, HTTP_SERVICE_UNAVAILABLE);
    }
    ctx->body_is_data = 1;
    ctx->max_payload = handoff_server_config_of(r->server)->max_payload;
    return 0;
}

static int refuse_connection(request_rec *r, take_ctx *ctx)
{
    handoff_result result = HANDOFF_REFUSED_FILTER;
    int status = handoff_refuse_connection(r, &result);

    return status != 0 && refuse(r, ctx, result, status);
}

/* Until its output ends without a fault an application has failed: a handler that gives up says so
 * to httpd, which drops our filter with the others, and nobody tells us. */
static apr_status_t count_unfinished(void *baton)
{
    const take_ctx *ctx = baton;

    if (ctx->state == STATE_COLLECT && ctx->error == 0) {
        handoff_status_count(ctx->wish->declared, HANDOFF_APPLICATION_FAILED);
    }
    return APR_SUCCESS;
}

static void expect_the_end(request_rec *r, take_ctx *ctx)
{
    handoff_note(r, HANDOFF_NOTE_RESULT, handoff_result_name(HANDOFF_APPLICATION_FAILED));
    apr_pool_cleanup_register(r->pool, ctx, count_unfinished, apr_pool_cleanup_null);
}

static int says_anything(const request_rec *r)
{
    return may_have_ours(r->headers_out) || may_have_ours(r->err_headers_out);
}

/* Looks at the headers, once. Returns whether the body is ours to swallow. */
static __attribute__((noinline)) int decide(ap_filter_t *f)
{
    request_rec *r = f->r;
    take_ctx *ctx = f->ctx;
    const char *asked = get_header(r, HANDOFF_HEADER_TARGET);
    const char *data = get_header(r, HANDOFF_HEADER_DATA);
    const char *from = get_header(r, HANDOFF_HEADER_DATA_FROM);

    if (asked == NULL && data == NULL && from == NULL) {
        return 0;
    }
    remove_response_headers(r);
    if (asked == NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "%s without " HANDOFF_HEADER_TARGET
                      " is removed", data != NULL ? HANDOFF_HEADER_DATA : HANDOFF_HEADER_DATA_FROM);
        return 0;
    }
    if (handoff_is_detached(r->connection)) {
        /* The ErrorDocument of an application that died after its output: mod_proxy_fcgi then answers
         * with 500. What became of the client is noted already. */
        ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "the client was handed off already");
        f->ctx = ctx = apr_pcalloc(r->pool, sizeof(*ctx));
        ctx->state = STATE_DONE;
        return 1;
    }
    handoff_forget_notes(r);
    if (ctx != NULL) {
        ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, r, HANDOFF_HEADER_TARGET " is ignored: %s",
                      ctx->may_not_ask);
        handoff_note_result(r, NULL, HANDOFF_IGNORED);
        return 0;
    }
    f->ctx = ctx = apr_pcalloc(r->pool, sizeof(*ctx));
    ctx->state = STATE_COLLECT;
    ctx->wish = apr_pcalloc(r->pool, sizeof(*ctx->wish));
    ctx->wish->payload_fd = -1;
    ctx->wish->asked = asked;
    ctx->wish->data = data;
    ctx->wish->data_length = data != NULL ? strlen(data) : 0;
    if (r->header_only) {
        const handoff_declared_target *target = handoff_find_target(asked);

        if (target == NULL || !target->envelope) {
            /* The plain message cannot tell the daemon that this is HEAD; it would send a body. */
            ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "HEAD is answered without a handoff");
            handoff_note_result(r, target, HANDOFF_HEAD);
            return 0;
        }
    }
    handoff_note(r, HANDOFF_NOTE_TARGET, asked);
    ap_log_rerror(APLOG_MARK, APLOG_TRACE2, 0, r, "asked for a handoff to %s with %s", asked,
                  data != NULL ? "data in a header" : from != NULL ? "the body as data"
                                                                   : "no data");
    if (!refuse_connection(r, ctx) && !refuse_target(r, ctx) && !refuse_data(r, ctx, from)) {
        expect_the_end(r, ctx);
    }
    return 1;
}

/* The handler has failed. If it asked before, and none of its output came to our filter, then that
 * is noted here. */
static void note_that_it_failed(request_rec *r)
{
    const handoff_declared_target *target;
    const char *asked;

    if (!says_anything(r)) {
        return;
    }
    asked = get_header(r, HANDOFF_HEADER_TARGET);
    remove_response_headers(r);
    if (asked == NULL || r->main != NULL || !handoff_dir_config_of(r)->enabled) {
        return;
    }
    target = handoff_find_target(asked);
    handoff_forget_notes(r);
    handoff_note(r, HANDOFF_NOTE_TARGET, target != NULL ? target->name : asked);
    handoff_note_result(r, target, HANDOFF_APPLICATION_FAILED);
}

/* --- collecting -------------------------------------------------------------------------------- */

/* Keeps a piece of the body where it is the data. */
static void keep(request_rec *r, take_ctx *ctx, const char *bytes, apr_size_t length)
{
    handoff_wish *wish = ctx->wish;
    int error;

    if (wish->payload_length + length > (apr_uint64_t)ctx->max_payload) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "handoff to %s failed: the application wrote "
                      "more than %" APR_OFF_T_FMT " bytes of data; let it write less, or raise "
                      "SocketHandoffMaxPayload", wish->asked, ctx->max_payload);
        refuse(r, ctx, HANDOFF_TOO_LARGE, HTTP_INTERNAL_SERVER_ERROR);
        return;
    }
    error = handoff_payload_append(wish->payload_fd, bytes, length);
    if (error != 0) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, APR_FROM_OS_ERROR(error), r, "handoff to %s failed: "
                      "Apache has no memory left for the data", wish->asked);
        refuse(r, ctx, HANDOFF_NO_RESOURCES, HTTP_SERVICE_UNAVAILABLE);
        return;
    }
    wish->payload_length += length;
}

/* Reads one piece of the body. Also where it is thrown away a pipe or socket is read to its end:
 * that lets the application finish, where closing it would kill it in the middle of its work. */
static int read_piece(request_rec *r, take_ctx *ctx, apr_bucket *e)
{
    int is_kept = ctx->body_is_data && ctx->state == STATE_COLLECT && ctx->error == 0;
    const char *bytes;
    apr_size_t length;

    if (!is_kept && e->length != (apr_size_t)-1) {
        return 0;
    }
    if (apr_bucket_read(e, &bytes, &length, APR_BLOCK_READ) != APR_SUCCESS) {
        return HTTP_BAD_GATEWAY;
    }
    if (is_kept) {
        keep(r, ctx, bytes, length);
    }
    return 0;
}

/* Swallows the brigade; returns whether the application's output has ended. */
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
        else if (!APR_BUCKET_IS_METADATA(e)) {
            failed = read_piece(r, ctx, e);
        }
        if (failed != 0 && ctx->error == 0) {
            ap_log_rerror(APLOG_MARK, APLOG_INFO, 0, r, "the %s failed after a handoff to %s was "
                          "asked for; the client is answered with %d",
                          ctx->state == STATE_COLLECT ? "application" : "request's body",
                          ctx->wish->asked, failed);
            if (ctx->state == STATE_COLLECT) {
                refuse(r, ctx, HANDOFF_APPLICATION_FAILED, failed);
            }
            ctx->error = failed;
        }
        apr_bucket_delete(e);
    }
    return at_end;
}

/* --- the filters ------------------------------------------------------------------------------ */

/* What the application asked for is under way: nothing of its output goes further. noinline: so
 * that a request that asks for nothing does not pay for its stack. */
static __attribute__((noinline)) void swallow(request_rec *r, take_ctx *ctx, apr_bucket_brigade *bb)
{
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
}

/* The context of a response that goes on as usual. Nobody writes to it. */
static take_ctx passing;

/* The last filter that was found harmless, so that its name is read once and not for every request.
 * Forgotten with the configuration in whose pool it lives. */
static _Atomic(const ap_filter_rec_t *) known_harmless;

/* Filters of contents that change a body and set no header of ours: those of mod_deflate and
 * mod_brotli, and what mod_filter makes of them for AddOutputFilterByType, which with Debian's own
 * configuration stands in the way of nearly every response. In another spelling they merely cost
 * more. */
static __attribute__((noinline)) int find_harmless(const ap_filter_rec_t *rec)
{
    static const char *const names[] = {
        "BYTYPE:DEFLATE", "deflate", "BYTYPE:BROTLI_COMPRESS", "brotli_compress"
    };
    size_t i;

    for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(rec->name, names[i]) == 0) {
            atomic_store_explicit(&known_harmless, rec, memory_order_relaxed);
            return 1;
        }
    }
    return 0;
}

/* Whether anybody behind this filter may still set a header of ours: the chain is sorted by type,
 * and a filter of contents, such as that of mod_headers, comes before the headers are written. */
static int may_be_set_behind(const ap_filter_t *f)
{
    for (f = f->next; f != NULL && f->frec->ftype < AP_FTYPE_PROTOCOL; f = f->next) {
        if (f->frec != atomic_load_explicit(&known_harmless, memory_order_relaxed)
            && !find_harmless(f->frec)) {
            return 1;
        }
    }
    return 0;
}

static apr_status_t take_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    request_rec *r = f->r;
    const take_ctx *ctx = f->ctx;

    if (ctx == &passing) {
        return ap_pass_brigade(f->next, bb);
    }
    if (ctx == NULL || ctx->state == STATE_DECIDE) {
        if (APR_BRIGADE_EMPTY(bb)) {
            return APR_SUCCESS;
        }
        if (!says_anything(r) || !decide(f)) {
            /* Most responses are one brigade: staying costs them less than leaving the chain. */
            f->ctx = &passing;
            if (r->main == NULL && may_be_set_behind(f)) {
                /* The early one comes behind those that may, and before mod_cache, which keeps
                 * what it sees. */
                ap_add_output_filter_handle(strip_early_handle, NULL, r, r->connection);
                if (!cache_is_loaded) {
                    ap_add_output_filter_handle(strip_handle, NULL, r, r->connection);
                }
            }
            return ap_pass_brigade(f->next, bb);
        }
    }
    swallow(r, f->ctx, bb);

    /* Never an error: a handler that is told of one answers it too, and the client would see two
     * responses. */
    return APR_SUCCESS;
}

/* Some headers arrive without passing the take filter: from mod_headers, and with the errors for
 * which httpd drops the filters of the response. */
static apr_status_t strip_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    remove_response_headers(f->r);
    ap_remove_output_filter(f);
    return ap_pass_brigade(f->next, bb);
}

apr_status_t handoff_swallow(ap_filter_t *f, apr_bucket_brigade *bb)
{
    (void)f;
    apr_brigade_cleanup(bb);
    return APR_SUCCESS;
}

/* Modules are loaded by now, and none of this configuration's filters is in use yet. */
static int begin_filters(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp)
{
    (void)pconf;
    (void)plog;
    (void)ptemp;
    atomic_store_explicit(&known_harmless, NULL, memory_order_relaxed);
    cache_is_loaded = ap_find_linked_module("mod_cache.c") != NULL;
    return OK;
}

void handoff_filter_register(void)
{
    ap_hook_pre_config(begin_filters, NULL, NULL, APR_HOOK_MIDDLE);
    take_handle = ap_register_output_filter("SOCKET_HANDOFF", take_filter, NULL,
                                            AP_FTYPE_RESOURCE - 1);
    strip_early_handle = ap_register_output_filter("SOCKET_HANDOFF_STRIP_EARLY", strip_filter, NULL,
                                                   AP_FTYPE_CONTENT_SET);
    strip_handle = ap_register_output_filter("SOCKET_HANDOFF_STRIP", strip_filter, NULL,
                                             AP_FTYPE_PROTOCOL - 1);
}

int handoff_forget_request_headers(request_rec *r)
{
    remove_headers(r->headers_in);
    if (r->prev != NULL) {
        if (ap_is_HTTP_ERROR(r->prev->status)) {
            note_that_it_failed(r->prev);
        }
        handoff_inherit_notes(r);
    }
    return DECLINED;
}

void handoff_insert_filters(request_rec *r)
{
    const char *may_not_ask = handoff_why_may_not_ask(r);
    take_ctx *ctx = NULL;

    /* Only the handler, which runs next, may ask: not a configuration file of the content's owner
     * (mod_cern_meta), nor the request that failed and led to this ErrorDocument. */
    remove_response_headers(r);

    if (may_not_ask != NULL) {
        ctx = apr_pcalloc(r->pool, sizeof(*ctx));
        ctx->state = STATE_DECIDE;
        ctx->may_not_ask = may_not_ask;
    }
    ap_add_output_filter_handle(take_handle, ctx, r, r->connection);
    if (cache_is_loaded && r->main == NULL) {
        /* What a cache has kept it sends in the place of the handler, and drops every filter that
         * comes before its own: the take filter too. It may be older than this module. */
        ap_add_output_filter_handle(strip_handle, NULL, r, r->connection);
    }
}

void handoff_insert_error_filter(request_rec *r)
{
    note_that_it_failed(r);
    ap_add_output_filter_handle(strip_handle, NULL, r, r->connection);
}
