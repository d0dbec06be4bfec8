/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_config.h"

#include "apr_lib.h"
#include "apr_strings.h"
#include "http_log.h"

#include <errno.h>
#include <stdlib.h>

APLOG_USE_MODULE(socket_handoff);

/* Together the 250 ms that a request may at worst wait for a daemon that does not answer: with
 * the daemon gone, every worker is held for this long per request, so it has to be short. */
#define DEFAULT_CONNECT_TIMEOUT_MS 150
#define DEFAULT_SEND_TIMEOUT_MS 100
#define DEFAULT_MAX_RETRIES 2
#define DEFAULT_PREFIX ""           /* canonical form of /var/run/ */

#define MAX_TIMEOUT_MS 10000
#define MAX_MAX_RETRIES 10

void *handoff_create_server_config(apr_pool_t *p, server_rec *s)
{
    handoff_server_config *config = apr_pcalloc(p, sizeof(*config));

    (void)s;
    config->prefixes = apr_array_make(p, 1, sizeof(const char *));
    APR_ARRAY_PUSH(config->prefixes, const char *) = DEFAULT_PREFIX;
    config->connect_timeout_ms = DEFAULT_CONNECT_TIMEOUT_MS;
    config->send_timeout_ms = DEFAULT_SEND_TIMEOUT_MS;
    config->max_retries = DEFAULT_MAX_RETRIES;
    return config;
}

void *handoff_merge_server_config(apr_pool_t *p, void *base, void *add)
{
    const handoff_server_config *outer = base;
    const handoff_server_config *inner = add;
    handoff_server_config *config = apr_pmemdup(p, outer, sizeof(*outer));

    if (inner->prefixes_set) {
        config->prefixes = inner->prefixes;
        config->prefixes_set = 1;
    }
    if (inner->connect_timeout_set) {
        config->connect_timeout_ms = inner->connect_timeout_ms;
        config->connect_timeout_set = 1;
    }
    if (inner->send_timeout_set) {
        config->send_timeout_ms = inner->send_timeout_ms;
        config->send_timeout_set = 1;
    }
    if (inner->max_retries_set) {
        config->max_retries = inner->max_retries;
        config->max_retries_set = 1;
    }
    return config;
}

void *handoff_create_dir_config(apr_pool_t *p, char *dir)
{
    handoff_dir_config *config = apr_pcalloc(p, sizeof(*config));

    (void)dir;
    config->enabled = 1;
    return config;
}

void *handoff_merge_dir_config(apr_pool_t *p, void *base, void *add)
{
    const handoff_dir_config *outer = base;
    const handoff_dir_config *inner = add;

    return apr_pmemdup(p, inner->enabled_set ? inner : outer, sizeof(handoff_dir_config));
}

const handoff_server_config *handoff_server_config_of(const server_rec *s)
{
    return ap_get_module_config(s->module_config, &socket_handoff_module);
}

const handoff_dir_config *handoff_dir_config_of(const request_rec *r)
{
    return ap_get_module_config(r->per_dir_config, &socket_handoff_module);
}

handoff_target_policy handoff_policy_of(const handoff_server_config *config)
{
    handoff_target_policy policy;

    policy.prefixes = (const char *const *)config->prefixes->elts;
    policy.count = (size_t)config->prefixes->nelts;
    return policy;
}

static const char *set_enabled(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_dir_config *config = dir_config;

    if (!ap_cstr_casecmp(arg, "on")) {
        config->enabled = 1;
    }
    else if (!ap_cstr_casecmp(arg, "off")) {
        config->enabled = 0;
    }
    else {
        return apr_psprintf(cmd->pool, "%s \"%s\": must be On or Off; write \"%s On\" where "
                            "applications may hand off and \"%s Off\" where they may not",
                            cmd->cmd->name, arg, cmd->cmd->name, cmd->cmd->name);
    }
    config->enabled_set = 1;
    return NULL;
}

static const char *add_prefix(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);
    const char *below = NULL;
    handoff_path_verdict verdict = handoff_prefix_parse(arg, &below);

    (void)dir_config;
    if (verdict != HANDOFF_PATH_OK) {
        return apr_psprintf(cmd->pool, "%s \"%s\": %s; must be /run, /var/run or an absolute path "
                            "below them without empty, \".\" or \"..\" components, such as /run/ "
                            "or /run/streaming-daemon.sock; let the daemon listen below /run and "
                            "name that place here",
                            cmd->cmd->name, ap_escape_logitem(cmd->pool, arg),
                            handoff_path_reason(verdict));
    }
    if (!config->prefixes_set) {
        /* The first one written replaces the default, further ones add to it. */
        config->prefixes = apr_array_make(cmd->pool, 2, sizeof(const char *));
        config->prefixes_set = 1;
    }
    APR_ARRAY_PUSH(config->prefixes, const char *) = below;
    return NULL;
}

static const char *parse_number(cmd_parms *cmd, const char *arg, int low, int high,
                                const char *unit, const char *fix, int *value)
{
    char *end = NULL;
    long number;

    errno = 0;
    number = strtol(arg, &end, 10);
    if (!apr_isdigit(arg[0]) || *end != '\0' || errno != 0 || number < low || number > high) {
        return apr_psprintf(cmd->pool, "%s \"%s\": must be a whole number of %s from %d to %d, "
                            "without a unit; %s", cmd->cmd->name, arg, unit, low, high, fix);
    }
    *value = (int)number;
    return NULL;
}

static const char *set_connect_timeout(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);

    (void)dir_config;
    config->connect_timeout_set = 1;
    return parse_number(cmd, arg, 1, MAX_TIMEOUT_MS, "milliseconds",
                        "150 is the default, a longer time holds workers while the daemon is down",
                        &config->connect_timeout_ms);
}

static const char *set_send_timeout(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);

    (void)dir_config;
    config->send_timeout_set = 1;
    return parse_number(cmd, arg, 1, MAX_TIMEOUT_MS, "milliseconds",
                        "100 is the default, a longer time holds workers while the daemon hangs",
                        &config->send_timeout_ms);
}

static const char *set_max_retries(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);

    (void)dir_config;
    config->max_retries_set = 1;
    return parse_number(cmd, arg, 0, MAX_MAX_RETRIES, "attempts",
                        "2 is the default, 0 tries once",
                        &config->max_retries);
}

/* None of them carries an OR_ flag, so none is allowed in .htaccess. */
const command_rec handoff_directives[] = {
    AP_INIT_TAKE1("SocketHandoffEnabled", set_enabled, NULL, RSRC_CONF | ACCESS_CONF,
                  "On or Off: whether applications here may hand off their client (default On)"),
    AP_INIT_ITERATE("SocketHandoffAllowedPrefix", add_prefix, NULL, RSRC_CONF,
                    "Directories or sockets below /run that may be handed to (default /var/run/)"),
    AP_INIT_TAKE1("SocketHandoffConnectTimeoutMs", set_connect_timeout, NULL, RSRC_CONF,
                  "Milliseconds for reaching the daemon, retries included (default 150)"),
    AP_INIT_TAKE1("SocketHandoffSendTimeoutMs", set_send_timeout, NULL, RSRC_CONF,
                  "Further milliseconds for passing the message on (default 100)"),
    AP_INIT_TAKE1("SocketHandoffMaxRetries", set_max_retries, NULL, RSRC_CONF,
                  "Further attempts while the daemon restarts (default 2)"),
    { NULL, { NULL }, NULL, 0, RAW_ARGS, NULL }
};
