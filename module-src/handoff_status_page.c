/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */

/*
 * The status page: one reading of all rows, written in one of four formats. It changes nothing,
 * so whoever may see it may ask for it as often as he likes.
 */

#include "handoff_status.h"

#include "apr_strings.h"
#include "apr_time.h"
#include "http_config.h"
#include "http_core.h"
#include "http_protocol.h"
#include "http_request.h"
#include "util_time.h"

#include <string.h>

#include "handoff_envelope.h"
#include "handoff_version.h"

#define HANDLER "socket-handoff-status"

/* What stands for the row without a target; no target can be called so. */
#define NO_TARGET "none"

/* A row to be shown. The strings are valid UTF-8. */
typedef struct {
    const handoff_declared_target *target;      /* NULL: the row without one                      */
    const char *name;
    const char *path;                           /* NULL without a target                          */
    const char *user;                           /* NULL: anybody                                  */
    handoff_row_values values;
} shown_row;

typedef struct {
    request_rec *r;
    const shown_row *rows;
    int count;
} status_page;

/* --- texts ----------------------------------------------------------------------------------- */

/* Like the envelope: what is not UTF-8 is taken for ISO-8859-1. A path may be any bytes. */
static const char *to_utf8(apr_pool_t *p, const char *text)
{
    size_t len;
    size_t i;
    char *out;
    char *end;

    if (text == NULL || handoff_is_utf8(text, strlen(text))) {
        return text;
    }
    len = strlen(text);
    out = end = apr_palloc(p, 2 * len + 1);
    for (i = 0; i < len; i++) {
        unsigned char byte = (unsigned char)text[i];

        if (byte < 0x80) {
            *end++ = (char)byte;
        }
        else {
            *end++ = (char)(0xc0 | byte >> 6);
            *end++ = (char)(0x80 | (byte & 0x3f));
        }
    }
    *end = '\0';
    return out;
}

/* The inside of a string in JSON, and of a label in Prometheus' text: no text here has control
 * bytes (handoff_target.c refuses them in paths, httpd's parser in arguments), so the two differ in
 * nothing. One that slips in is shown as a space. */
static const char *quoted(apr_pool_t *p, const char *text)
{
    char *out = apr_palloc(p, 2 * strlen(text) + 1);
    char *end = out;

    for (; *text != '\0'; text++) {
        if (*text == '"' || *text == '\\') {
            *end++ = '\\';
        }
        *end++ = (char)((unsigned char)*text < 0x20 ? ' ' : *text);
    }
    *end = '\0';
    return out;
}

static const char *json_string(apr_pool_t *p, const char *text)
{
    return text != NULL ? apr_pstrcat(p, "\"", quoted(p, text), "\"", NULL) : "null";
}

/* Exactly, and in every locale. */
static const char *seconds(apr_pool_t *p, apr_uint64_t us)
{
    return apr_psprintf(p, "%" APR_UINT64_T_FMT ".%06" APR_UINT64_T_FMT, us / 1000000,
                        us % 1000000);
}

static const char *iso_time(apr_pool_t *p, apr_int64_t since)
{
    apr_time_exp_t t;

    apr_time_exp_gmt(&t, apr_time_from_sec(since));
    return apr_psprintf(p, "%04d-%02d-%02dT%02d:%02d:%02dZ", t.tm_year + 1900, t.tm_mon + 1,
                        t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec);
}

static const char *transport_name(handoff_transport transport)
{
    switch (transport) {
    case HANDOFF_TRANSPORT_AUTO:      return "auto";
    case HANDOFF_TRANSPORT_SEQPACKET: return "seqpacket";
    case HANDOFF_TRANSPORT_STREAM:    return "stream";
    }
    return "unknown";
}

static const char *on_off(int on)
{
    return on ? "on" : "off";
}

/* --- ?auto ----------------------------------------------------------------------------------- */

static void write_auto(const status_page *page)
{
    request_rec *r = page->r;
    int i;

    ap_rprintf(r, "Version: %s\nSince: %s\n", HANDOFF_VERSION,
               iso_time(r->pool, handoff_status_since()));
    for (i = 0; i < page->count; i++) {
        const shown_row *row = &page->rows[i];
        const handoff_row_values *v = &row->values;
        apr_uint64_t upto = 0;
        int k;

        if (row->target != NULL) {
            ap_rprintf(r, "%s/path: %s\n%s/consecutive-failures: %u\n%s/skipped-ms: %d\n",
                       row->name, row->path, row->name, v->fails, row->name, v->wait_ms);
        }
        for (k = 0; k < HANDOFF_RESULT_COUNT; k++) {
            ap_rprintf(r, "%s/%s: %" APR_UINT64_T_FMT "\n", row->name,
                       handoff_result_name((handoff_result)k), v->results[k]);
        }
        ap_rprintf(r, "%s/data-bytes: %" APR_UINT64_T_FMT "\n", row->name, v->data_bytes);
        for (k = 0; k < HANDOFF_BUCKET_COUNT; k++) {
            upto += v->buckets[k];
            ap_rprintf(r, "%s/duration-up-to-%s: %" APR_UINT64_T_FMT "\n", row->name,
                       handoff_bucket_bound((size_t)k), upto);
        }
        ap_rprintf(r, "%s/duration-sum: %s\n%s/duration-count: %" APR_UINT64_T_FMT "\n", row->name,
                   seconds(r->pool, v->time_us), row->name, v->count);
    }
}

/* --- ?prometheus ----------------------------------------------------------------------------- */

static void family(request_rec *r, const char *name, const char *type, const char *help)
{
    ap_rprintf(r, "# HELP socket_handoff_%s %s\n# TYPE socket_handoff_%s %s\n", name, help, name,
               type);
}

/* All samples of a family must stand together, so every family walks over all rows. */
static void write_prometheus(const status_page *page)
{
    request_rec *r = page->r;
    const shown_row *row;
    const shown_row *end = page->rows + page->count;
    int k;

    family(r, "build_info", "gauge", "The version of mod_socket_handoff; always 1.");
    ap_rprintf(r, "socket_handoff_build_info{version=\"%s\"} 1\n", HANDOFF_VERSION);
    family(r, "start_time_seconds", "gauge", "When counting began, in seconds since 1970.");
    ap_rprintf(r, "socket_handoff_start_time_seconds %" APR_INT64_T_FMT "\n",
               handoff_status_since());

    family(r, "results_total", "counter",
           "What became of requests for a handoff, or of attempts at a target.");
    for (row = page->rows; row < end; row++) {
        for (k = 0; k < HANDOFF_RESULT_COUNT; k++) {
            ap_rprintf(r, "socket_handoff_results_total{target=\"%s\",result=\"%s\"} %"
                       APR_UINT64_T_FMT "\n", row->name, handoff_result_name((handoff_result)k),
                       row->values.results[k]);
        }
    }
    family(r, "data_bytes_total", "counter", "Bytes of the applications' data handed off.");
    for (row = page->rows; row < end; row++) {
        ap_rprintf(r, "socket_handoff_data_bytes_total{target=\"%s\"} %" APR_UINT64_T_FMT "\n",
                   row->name, row->values.data_bytes);
    }
    family(r, "duration_seconds", "histogram",
           "How long it took to hand clients to the daemon.");
    for (row = page->rows; row < end; row++) {
        apr_uint64_t upto = 0;

        for (k = 0; k < HANDOFF_BUCKET_COUNT; k++) {
            upto += row->values.buckets[k];
            ap_rprintf(r, "socket_handoff_duration_seconds_bucket{target=\"%s\",le=\"%s\"} %"
                       APR_UINT64_T_FMT "\n", row->name, handoff_bucket_bound((size_t)k), upto);
        }
        ap_rprintf(r, "socket_handoff_duration_seconds_sum{target=\"%s\"} %s\n"
                   "socket_handoff_duration_seconds_count{target=\"%s\"} %" APR_UINT64_T_FMT "\n",
                   row->name, seconds(r->pool, row->values.time_us), row->name,
                   row->values.count);
    }
    family(r, "consecutive_failures", "gauge", "Failures of the target in a row.");
    for (row = page->rows; row < end; row++) {
        if (row->target != NULL) {
            ap_rprintf(r, "socket_handoff_consecutive_failures{target=\"%s\"} %u\n", row->name,
                       row->values.fails);
        }
    }
    family(r, "skipped", "gauge", "1 while the target is skipped, because it failed too often.");
    for (row = page->rows; row < end; row++) {
        if (row->target != NULL) {
            ap_rprintf(r, "socket_handoff_skipped{target=\"%s\"} %d\n", row->name,
                       row->values.wait_ms > 0);
        }
    }
    family(r, "target_info", "gauge", "Where a target's daemon listens; always 1.");
    for (row = page->rows; row < end; row++) {
        if (row->target != NULL) {
            ap_rprintf(r, "socket_handoff_target_info{target=\"%s\",path=\"%s\",backup=\"%s\"} 1\n",
                       row->name, quoted(r->pool, row->path),
                       row->target->backup_name != NULL ? row->target->backup_name : "");
        }
    }
}

/* --- ?json ----------------------------------------------------------------------------------- */

static void write_json_row(request_rec *r, const shown_row *row)
{
    const handoff_declared_target *target = row->target;
    const handoff_row_values *v = &row->values;
    apr_uint64_t upto = 0;
    int k;

    ap_rprintf(r, "{\"name\":\"%s\",\"declared\":%s", row->name, target ? "true" : "false");
    if (target != NULL) {
        ap_rprintf(r, ",\"path\":%s,\"transport\":\"%s\",\"envelope\":%s,\"ack\":%s,\"user\":%s,"
                   "\"backup\":%s,\"consecutive_failures\":%u,\"skipped_ms\":%d",
                   json_string(r->pool, row->path), transport_name(target->transport),
                   target->envelope ? "true" : "false", target->ack ? "true" : "false",
                   json_string(r->pool, row->user), json_string(r->pool, target->backup_name),
                   v->fails, v->wait_ms);
    }
    ap_rputs(",\"results\":{", r);
    for (k = 0; k < HANDOFF_RESULT_COUNT; k++) {
        ap_rprintf(r, "%s\"%s\":%" APR_UINT64_T_FMT, k > 0 ? "," : "",
                   handoff_result_name((handoff_result)k), v->results[k]);
    }
    ap_rprintf(r, "},\"data_bytes\":%" APR_UINT64_T_FMT ",\"duration_seconds\":{\"count\":%"
               APR_UINT64_T_FMT ",\"sum\":%s,\"up_to\":{", v->data_bytes, v->count,
               seconds(r->pool, v->time_us));
    for (k = 0; k < HANDOFF_BUCKET_COUNT; k++) {
        upto += v->buckets[k];
        ap_rprintf(r, "%s\"%s\":%" APR_UINT64_T_FMT, k > 0 ? "," : "",
                   handoff_bucket_bound((size_t)k), upto);
    }
    ap_rputs("}}}", r);
}

static void write_json(const status_page *page)
{
    request_rec *r = page->r;
    int i;

    ap_rprintf(r, "{\"version\":\"%s\",\"since\":%" APR_INT64_T_FMT ",\"targets\":[",
               HANDOFF_VERSION, handoff_status_since());
    for (i = 0; i < page->count; i++) {
        ap_rputs(i > 0 ? ",\n" : "\n", r);
        write_json_row(r, &page->rows[i]);
    }
    ap_rputs("\n]}\n", r);
}

/* --- for people ------------------------------------------------------------------------------ */

static const char style[] =
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0 2em}"
    "caption{text-align:left;font-weight:bold;padding:.3em 0}"
    "th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}"
    "th:first-child,td.text{text-align:left}"
    "td.down{text-align:left;color:#fff;background:#b00020}"
    "small{color:#666}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}"
    "th,td{border-color:#444}small{color:#aaa}}";

static const char *html(request_rec *r, const char *text)
{
    return ap_escape_html2(r->pool, text, 0);
}

static void write_health(request_rec *r, const shown_row *row)
{
    const handoff_row_values *v = &row->values;

    if (row->target == NULL) {
        ap_rputs("<td class=\"text\"></td>", r);
    }
    else if (v->wait_ms > 0) {
        ap_rprintf(r, "<td class=\"down\">skipped for %d.%d s after %u failures</td>",
                   v->wait_ms / 1000, v->wait_ms / 100 % 10, v->fails);
    }
    else if (v->fails > 0) {
        ap_rprintf(r, "<td class=\"text\">failed %u times in a row</td>", v->fails);
    }
    else {
        ap_rputs("<td class=\"text\">in use</td>", r);
    }
}

static void write_html_row(request_rec *r, const shown_row *row)
{
    const handoff_declared_target *target = row->target;
    const handoff_row_values *v = &row->values;
    int others = 0;
    int k;

    ap_rprintf(r, "<tr><th scope=\"row\">%s</th><td class=\"text\">", html(r, row->name));
    if (target != NULL) {
        ap_rprintf(r, "%s<br><small>transport %s, envelope %s, ack %s",
                   html(r, row->path), transport_name(target->transport),
                   on_off(target->envelope), on_off(target->ack));
        if (row->user != NULL) {
            ap_rprintf(r, ", user %s", html(r, row->user));
        }
        if (target->backup_name != NULL) {
            ap_rprintf(r, ", backup %s", html(r, target->backup_name));
        }
        ap_rputs("</small>", r);
    }
    else {
        ap_rputs("<small>undeclared paths, and what ended before a target was chosen</small>", r);
    }
    ap_rputs("</td>", r);
    write_health(r, row);
    ap_rprintf(r, "<td>%" APR_UINT64_T_FMT "</td><td class=\"text\">", v->results[HANDOFF_SENT]);
    for (k = 0; k < HANDOFF_RESULT_COUNT; k++) {
        if (k != HANDOFF_SENT && v->results[k] > 0) {
            ap_rprintf(r, "%s%s %" APR_UINT64_T_FMT, others++ > 0 ? ", " : "",
                       handoff_result_name((handoff_result)k), v->results[k]);
        }
    }
    ap_rprintf(r, "</td><td>%" APR_UINT64_T_FMT "</td><td>%s</td></tr>\n", v->data_bytes,
               v->count > 0 ? seconds(r->pool, v->time_us / v->count) : "");
}

static void write_html(const status_page *page)
{
    request_rec *r = page->r;
    int i;
    int k;

    ap_rprintf(r, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
               "<title>Handoffs of %s</title><style>%s</style></head><body>\n"
               "<h1>Handoffs of %s</h1>\n<p>mod_socket_handoff %s, counting since %s. "
               "The same as <a href=\"?auto\">text</a>, <a href=\"?json\">JSON</a> and for "
               "<a href=\"?prometheus\">Prometheus</a>.</p>\n",
               html(r, ap_get_server_name(r)), style, html(r, ap_get_server_name(r)),
               HANDOFF_VERSION, iso_time(r->pool, handoff_status_since()));
    ap_rputs("<table><caption>Targets</caption><tr><th scope=\"col\">target</th>"
             "<th scope=\"col\">socket</th><th scope=\"col\">now</th><th scope=\"col\">sent</th>"
             "<th scope=\"col\">otherwise</th><th scope=\"col\">bytes of data</th>"
             "<th scope=\"col\">mean seconds</th></tr>\n", r);
    for (i = 0; i < page->count; i++) {
        write_html_row(r, &page->rows[i]);
    }
    ap_rputs("</table>\n<table><caption>Sent handoffs by the seconds that they took</caption>"
             "<tr><th scope=\"col\">target</th>", r);
    for (k = 0; k < HANDOFF_BUCKET_COUNT; k++) {
        ap_rprintf(r, "<th scope=\"col\">%s%s</th>", k < HANDOFF_BOUND_COUNT ? "&le;&nbsp;" : "",
                   k < HANDOFF_BOUND_COUNT ? handoff_bucket_bound((size_t)k) : "more");
    }
    ap_rputs("</tr>\n", r);
    for (i = 0; i < page->count; i++) {
        ap_rprintf(r, "<tr><th scope=\"row\">%s</th>", html(r, page->rows[i].name));
        for (k = 0; k < HANDOFF_BUCKET_COUNT; k++) {
            ap_rprintf(r, "<td>%" APR_UINT64_T_FMT "</td>", page->rows[i].values.buckets[k]);
        }
        ap_rputs("</tr>\n", r);
    }
    ap_rputs("</table>\n</body></html>\n", r);
}

/* --- the handler ----------------------------------------------------------------------------- */

static const struct {
    const char *query;
    const char *type;
    void (*write)(const status_page *page);
} formats[] = {
    { "", "text/html; charset=utf-8", write_html },
    { "auto", "text/plain; charset=utf-8", write_auto },
    { "json", "application/json", write_json },
    { "prometheus", "text/plain; version=0.0.4; charset=utf-8", write_prometheus },
};

/* Prometheus' params write a name without a value as "prometheus=". */
static int asks_for(const char *query, const char *format)
{
    size_t len = strlen(format);

    return strncmp(query, format, len) == 0
           && (query[len] == '\0' || (len > 0 && strcmp(query + len, "=") == 0));
}

static void read_rows(status_page *page)
{
    const apr_array_header_t *targets = handoff_declared_targets();
    apr_pool_t *p = page->r->pool;
    shown_row *rows = apr_pcalloc(p, sizeof(*rows) * (apr_size_t)(targets->nelts + 1));
    int i;

    for (i = 0; i <= targets->nelts; i++) {
        const handoff_declared_target *target =
            i < targets->nelts ? APR_ARRAY_IDX(targets, i, handoff_declared_target *) : NULL;

        rows[i].target = target;
        rows[i].name = target != NULL ? target->name : NO_TARGET;
        rows[i].path = target != NULL ? to_utf8(p, target->path) : NULL;
        rows[i].user = target != NULL ? to_utf8(p, target->user) : NULL;
        handoff_status_read(target, &rows[i].values);
    }
    page->rows = rows;
    page->count = targets->nelts + 1;
}

/* noinline: so that a request that is not for this page does not pay for its stack. */
static __attribute__((noinline)) int answer(request_rec *r)
{
    const char *query = r->args != NULL ? r->args : "";
    status_page page = { r, NULL, 0 };
    size_t i;

    ap_allow_standard_methods(r, REPLACE_ALLOW, M_GET, -1);
    if (r->method_number != M_GET) {
        return HTTP_METHOD_NOT_ALLOWED;
    }
    apr_table_setn(r->headers_out, "Cache-Control", "no-store");
    apr_table_setn(r->headers_out, "X-Content-Type-Options", "nosniff");
    for (i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if (asks_for(query, formats[i].query)) {
            ap_set_content_type(r, formats[i].type);
            read_rows(&page);
            formats[i].write(&page);
            return OK;
        }
    }
    r->status = HTTP_BAD_REQUEST;
    ap_set_content_type(r, "text/plain; charset=utf-8");
    ap_rputs("There is no such format. Ask for the page without a query (HTML), or with ?auto "
             "(text), ?json or ?prometheus.\n", r);
    return OK;
}

/* Asked for every request that no other handler took. */
int handoff_status_page(request_rec *r)
{
    return r->handler != NULL && r->handler[0] == HANDLER[0] && !strcmp(r->handler, HANDLER)
           ? answer(r) : DECLINED;
}
