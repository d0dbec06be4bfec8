/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_config.h"
#include "handoff_counters.h"

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
#define DEFAULT_ALLOWED "run/"       /* canonical form of /var/run/ */

#define DEFAULT_MAX_PAYLOAD 8388608 /* 8 MiB, more than any prompt                                */

#define MAX_TIMEOUT_MS 60000
#define MAX_MAX_RETRIES 10
#define MAX_MAX_PAYLOAD 1073741824
#define MAX_TARGETS 63
_Static_assert(2 * MAX_TARGETS + 1 < HANDOFF_ROW_COUNT, "this configuration's and the last one's");

/* A directive that names a target, which may be declared further down: checked at the end. */
typedef struct {
    const char *said;               /* the directive and its value, for the message               */
    const char *name;
    const char *file;
    int line;
    handoff_declared_target *by;    /* whose backup it is, NULL for SocketHandoffAllow            */
} mention;

/* Of the whole server, in the pool of the configuration that is being read or was read last. */
static apr_array_header_t *targets;     /* of handoff_declared_target *                           */
static apr_array_header_t *mentions;    /* of mention                                             */

void *handoff_create_server_config(apr_pool_t *p, server_rec *s)
{
    handoff_server_config *config = apr_pcalloc(p, sizeof(*config));

    (void)s;
    config->prefixes = apr_array_make(p, 1, sizeof(const char *));
    APR_ARRAY_PUSH(config->prefixes, const char *) = DEFAULT_ALLOWED;
    config->connect_timeout_ms = DEFAULT_CONNECT_TIMEOUT_MS;
    config->send_timeout_ms = DEFAULT_SEND_TIMEOUT_MS;
    config->max_retries = DEFAULT_MAX_RETRIES;
    config->max_payload = DEFAULT_MAX_PAYLOAD;
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
    if (inner->max_payload_set) {
        config->max_payload = inner->max_payload;
        config->max_payload_set = 1;
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
    handoff_dir_config *config = apr_pmemdup(p, outer, sizeof(*outer));

    if (inner->enabled_set) {
        config->enabled = inner->enabled;
        config->enabled_set = 1;
    }
    if (inner->allowed_set) {
        config->allowed = inner->allowed;
        config->all_allowed = inner->all_allowed;
        config->allowed_set = 1;
    }
    return config;
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

const apr_array_header_t *handoff_declared_targets(void)
{
    static const apr_array_header_t none = { NULL, sizeof(handoff_declared_target *), 0, 0, NULL };

    return targets != NULL ? targets : &none;
}

static handoff_declared_target *target_named(const char *name)
{
    const apr_array_header_t *all = handoff_declared_targets();
    int i;

    for (i = 0; i < all->nelts; i++) {
        handoff_declared_target *target = APR_ARRAY_IDX(all, i, handoff_declared_target *);

        if (!strcmp(target->name, name)) {
            return target;
        }
    }
    return NULL;
}

const handoff_declared_target *handoff_find_target(const char *name_or_path)
{
    const apr_array_header_t *all = handoff_declared_targets();
    handoff_target socket = { NULL };
    int i;

    if (name_or_path[0] != '/') {
        return target_named(name_or_path);
    }
    if (handoff_socket_parse(name_or_path, &socket) != HANDOFF_PATH_OK) {
        return NULL;
    }
    for (i = 0; i < all->nelts; i++) {
        const handoff_declared_target *target = APR_ARRAY_IDX(all, i, handoff_declared_target *);

        if (!strcmp(target->socket.place, socket.place)) {
            return target;
        }
    }
    return NULL;
}

int handoff_may_use(const handoff_dir_config *config, const handoff_declared_target *target)
{
    int i;

    if (config->all_allowed) {
        return 1;
    }
    for (i = 0; config->allowed != NULL && i < config->allowed->nelts; i++) {
        if (!strcmp(APR_ARRAY_IDX(config->allowed, i, const char *), target->name)) {
            return 1;
        }
    }
    return 0;
}

/* --- directives ------------------------------------------------------------------------------ */

/* Not carrying an OR_ flag is not enough: AllowOverrideList opens .htaccess for every directive of
 * a directory, and an owner of files must not say what his files may reach. */
static const char *refuse_htaccess(cmd_parms *cmd)
{
    if (ap_check_cmd_context(cmd, NOT_IN_HTACCESS) != NULL) {
        return apr_psprintf(cmd->pool, "%s: must be in the server's own configuration, never in "
                            ".htaccess; move it into a <Directory> or <Location> there, and "
                            "remove it from AllowOverrideList", cmd->cmd->name);
    }
    if (ap_check_cmd_context(cmd, NOT_IN_LIMIT) != NULL) {
        return apr_psprintf(cmd->pool, "%s: must be outside of <Limit> and <LimitExcept>, where it "
                            "would hold for every method; write <If \"%%{REQUEST_METHOD} == "
                            "'POST'\"> instead", cmd->cmd->name);
    }
    return NULL;
}

static const char *set_enabled(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_dir_config *config = dir_config;
    const char *refusal = refuse_htaccess(cmd);

    if (refusal != NULL) {
        return refusal;
    }
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

/* The configuration of the original module may name any directory, and it goes on working. */
static void warn_outside_run(cmd_parms *cmd, const char *arg, const char *place)
{
    if (!handoff_place_is_run(place)) {
        ap_log_error(APLOG_MARK, APLOG_WARNING | APLOG_STARTUP, 0, cmd->server,
                     "%s \"%s\": is outside /run; whoever may create a socket there is given "
                     "clients, so no directory of this path may be writable for others, and none "
                     "may be a symlink", cmd->cmd->name, ap_escape_logitem(cmd->pool, arg));
    }
}

static const char *add_prefix(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);
    char *text = apr_pstrdup(cmd->pool, arg);
    const char *place = NULL;
    handoff_path_verdict verdict;

    (void)dir_config;
    /* The original takes doubled slashes for one, and its last line for the only one. */
    ap_no2slash(text);
    verdict = handoff_prefix_parse(text, &place);
    if (verdict != HANDOFF_PATH_OK) {
        return apr_psprintf(cmd->pool, "%s \"%s\": %s; must be the absolute path of a socket, or of "
                            "a directory other than \"/\", without empty, \".\" or \"..\" "
                            "components; write /run/streaming-daemon.sock or /run/",
                            cmd->cmd->name, ap_escape_logitem(cmd->pool, arg),
                            handoff_path_reason(verdict));
    }
    if (config->prefixes_line != cmd->directive) {
        config->prefixes = apr_array_make(cmd->pool, 2, sizeof(const char *));
        config->prefixes_line = cmd->directive;
        config->prefixes_set = 1;
    }
    warn_outside_run(cmd, arg, place);
    APR_ARRAY_PUSH(config->prefixes, const char *) = place;
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

static const char *set_max_payload(cmd_parms *cmd, void *dir_config, const char *arg)
{
    handoff_server_config *config = ap_get_module_config(cmd->server->module_config,
                                                         &socket_handoff_module);
    int bytes = 0;
    const char *refusal = parse_number(cmd, arg, 0, MAX_MAX_PAYLOAD, "bytes",
                                       "8388608 is the default, a larger body of an application "
                                       "that is to be data is refused", &bytes);

    (void)dir_config;
    config->max_payload = bytes;
    config->max_payload_set = 1;
    return refusal;
}

/* `SocketHandoffTarget "llm" "maxfails=x": what is wrong`. argument may be NULL. */
static const char *bad_target(cmd_parms *cmd, const char *name, const char *argument,
                              const char *why)
{
    return apr_psprintf(cmd->pool, "%s \"%s\"%s%s%s: %s", cmd->cmd->name,
                        ap_escape_logitem(cmd->pool, name), argument != NULL ? " \"" : "",
                        argument != NULL ? ap_escape_logitem(cmd->pool, argument) : "",
                        argument != NULL ? "\"" : "", why);
}

static void remember_mention(cmd_parms *cmd, const char *said, const char *name,
                             handoff_declared_target *by)
{
    mention *m = apr_array_push(mentions);

    m->said = said;
    m->name = name;
    m->file = apr_pstrdup(cmd->pool, cmd->directive->filename);
    m->line = cmd->directive->line_num;
    m->by = by;
}

static const apr_array_header_t *split(apr_pool_t *p, const char *list)
{
    apr_array_header_t *names = apr_array_make(p, 1, sizeof(const char *));
    char *rest = list != NULL ? apr_pstrdup(p, list) : NULL;
    char *name;

    while (rest != NULL && (name = apr_strtok(rest, ",", &rest)) != NULL) {
        APR_ARRAY_PUSH(names, const char *) = name;
    }
    return names;
}

/* The uid of user=, which may name somebody whom this host does not know. */
static const char *find_user(cmd_parms *cmd, const handoff_target_options *options, long long *uid)
{
    apr_uid_t found;
    apr_gid_t group;

    *uid = options->user_id;
    if (options->user == NULL || options->user_id >= 0) {
        return NULL;
    }
    if (apr_uid_get(&found, &group, options->user, cmd->temp_pool) != APR_SUCCESS) {
        return "must be the name or number of a user of this host; create that user first, or "
               "name the one who opens the daemon's socket (root where systemd does)";
    }
    *uid = (long long)found;
    return NULL;
}

static const char *declare_target(cmd_parms *cmd, void *dir_config, int argc, char *const argv[])
{
    handoff_declared_target *target = apr_pcalloc(cmd->pool, sizeof(*target));
    handoff_target_options options;
    handoff_path_verdict verdict;
    const char *why;
    const char *name = argc > 0 ? argv[0] : "";
    int i;

    (void)dir_config;
    if (ap_check_cmd_context(cmd, GLOBAL_ONLY | NOT_IN_HTACCESS) != NULL) {
        return bad_target(cmd, name, NULL, "must be in the server's own configuration, outside of "
                          "every section; move it out of this one, and say with "
                          "SocketHandoffAllow who may use it");
    }
    if (argc < 2) {
        return bad_target(cmd, name, NULL, "must be followed by a name and the daemon's socket; "
                          "write SocketHandoffTarget llm unix:/run/streaming-daemon.sock");
    }
    if (!handoff_name_is_good(name)) {
        return bad_target(cmd, name, NULL, "must be a name of 1 to 64 letters, digits, \".\", "
                          "\"_\" and \"-\" that begins with a letter or digit, and neither "
                          "All nor None; choose another name");
    }
    if (target_named(name) != NULL) {
        return bad_target(cmd, name, NULL, "must be declared once; remove one of the two, or "
                          "choose another name");
    }
    ap_assert(targets != NULL);         /* begin_targets came before every directive */
    if (targets->nelts >= MAX_TARGETS) {
        return bad_target(cmd, name, NULL, apr_psprintf(cmd->pool, "must be one of at most %d "
                          "targets; remove those that nobody uses", MAX_TARGETS));
    }
    target->name = apr_pstrdup(cmd->pool, name);
    verdict = handoff_address_parse(apr_pstrdup(cmd->pool, argv[1]), &target->path,
                                    &target->socket);
    if (verdict != HANDOFF_PATH_OK) {
        return bad_target(cmd, name, argv[1],
                          apr_psprintf(cmd->pool, "%s; must be unix: and the absolute path of a "
                                       "socket without empty, \".\" or \"..\" components; "
                                       "write unix:/run/streaming-daemon.sock", handoff_path_reason(verdict)));
    }
    warn_outside_run(cmd, argv[1], target->socket.place);
    handoff_options_init(&options);
    for (i = 2; i < argc; i++) {
        const char *text = apr_pstrdup(cmd->pool, argv[i]);

        why = handoff_option_parse(text, &options);
        if (why != NULL) {
            return bad_target(cmd, name, text, why);
        }
    }
    why = handoff_options_check(&options);
    if (why != NULL) {
        return bad_target(cmd, name, apr_pstrcat(cmd->pool, "headers=", options.headers, NULL),
                          why);
    }
    why = find_user(cmd, &options, &target->user_id);
    if (why != NULL) {
        return bad_target(cmd, name, apr_pstrcat(cmd->pool, "user=", options.user, NULL), why);
    }
    target->transport = options.transport;
    target->envelope = options.envelope;
    target->ack = options.ack;
    target->user = options.user;
    target->timeout_ms = options.timeout_ms;
    target->retries = options.retries;
    target->headers = split(cmd->pool, options.headers);
    target->backup_name = options.backup;
    target->max_fails = options.max_fails;
    target->retry_ms = options.retry_ms;
    target->slot = -1;
    if (target->backup_name != NULL) {
        remember_mention(cmd, apr_pstrcat(cmd->pool, cmd->cmd->name, " \"", name, "\" \"backup=",
                                          target->backup_name, "\"", NULL),
                         target->backup_name, target);
    }
    APR_ARRAY_PUSH(targets, handoff_declared_target *) = target;
    return NULL;
}

static const char *allow_targets(cmd_parms *cmd, void *dir_config, int argc, char *const argv[])
{
    handoff_dir_config *config = dir_config;
    const char *refusal = refuse_htaccess(cmd);
    apr_array_header_t *names;
    int i;

    if (refusal != NULL) {
        return refusal;
    }
    if (argc == 0) {
        return apr_psprintf(cmd->pool, "%s: must be followed by names of targets, All or None; "
                            "write %s llm", cmd->cmd->name, cmd->cmd->name);
    }
    if (argc > MAX_TARGETS) {
        /* httpd drops what is behind the 64th. */
        return apr_psprintf(cmd->pool, "%s: must name at most %d targets; write All",
                            cmd->cmd->name, MAX_TARGETS);
    }
    /* Further lines in the same section add to the first. */
    names = config->allowed != NULL ? apr_array_copy(cmd->pool, config->allowed)
                                    : apr_array_make(cmd->pool, argc, sizeof(const char *));
    for (i = 0; i < argc; i++) {
        int all = !ap_cstr_casecmp(argv[i], "all");
        int none = !ap_cstr_casecmp(argv[i], "none");

        if ((all || none) ? (argc > 1 || config->allowed_set)
                          : (config->allowed_set && config->allowed == NULL)) {
            return apr_psprintf(cmd->pool, "%s \"%s\": must be names of targets, or All or None "
                                "alone; keep one of them in this section", cmd->cmd->name,
                                ap_escape_logitem(cmd->pool, argv[i]));
        }
        if (all || none) {
            config->all_allowed = all;
            config->allowed_set = 1;
            return NULL;
        }
        if (!handoff_name_is_good(argv[i])) {
            return apr_psprintf(cmd->pool, "%s \"%s\": must be All, None or the names of declared "
                                "targets; a socket is named by its SocketHandoffTarget, not by its "
                                "path", cmd->cmd->name, ap_escape_logitem(cmd->pool, argv[i]));
        }
        APR_ARRAY_PUSH(names, const char *) = apr_pstrdup(cmd->pool, argv[i]);
        remember_mention(cmd, apr_pstrcat(cmd->pool, cmd->cmd->name, " \"", argv[i], "\"", NULL),
                         APR_ARRAY_IDX(names, names->nelts - 1, const char *), NULL);
    }
    config->allowed = names;
    config->all_allowed = 0;
    config->allowed_set = 1;
    return NULL;
}

/* --- the configuration as a whole ------------------------------------------------------------ */

static apr_status_t forget_targets(void *baton)
{
    (void)baton;
    targets = NULL;
    mentions = NULL;
    return APR_SUCCESS;
}

/* Once per reading of the configuration, of which there are two at startup. */
static int begin_targets(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp)
{
    (void)plog;
    (void)ptemp;
    targets = apr_array_make(pconf, 4, sizeof(handoff_declared_target *));
    mentions = apr_array_make(pconf, 8, sizeof(mention));
    apr_pool_cleanup_register(pconf, NULL, forget_targets, apr_pool_cleanup_null);
    return OK;
}

static int complain(server_rec *s, const mention *m, const char *why)
{
    ap_log_error(APLOG_MARK, APLOG_EMERG | APLOG_STARTUP, 0, s, "on line %d of %s: %s: %s",
                 m->line, m->file, m->said, why);
    return HTTP_INTERNAL_SERVER_ERROR;
}

/* "a -> b -> a" where the backups of this target lead back to it, NULL where they end. */
static const char *backup_cycle(apr_pool_t *p, const handoff_declared_target *start)
{
    const handoff_declared_target *target = start->backup;
    const char *way = start->name;
    int steps;

    for (steps = 0; target != NULL && steps < targets->nelts; steps++) {
        way = apr_pstrcat(p, way, " -> ", target->name, NULL);
        if (target == start) {
            return way;
        }
        target = target->backup;
    }
    return NULL;
}

/* Here and not in post_config, which configtest does not run. */
static int check_targets(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp, server_rec *s)
{
    int verdict = OK;
    int i;

    (void)pconf;
    (void)plog;
    for (i = 0; i < mentions->nelts; i++) {
        const mention *m = &APR_ARRAY_IDX(mentions, i, mention);
        handoff_declared_target *found = target_named(m->name);

        if (found == NULL) {
            verdict = complain(s, m, apr_psprintf(ptemp, "must be the name of a declared target; "
                                                  "write SocketHandoffTarget %s unix:/run/... "
                                                  "outside of every section, or correct the name",
                                                  m->name));
        }
        else if (m->by != NULL) {
            m->by->backup = found;
        }
    }
    for (i = 0; verdict == OK && i < mentions->nelts; i++) {
        const mention *m = &APR_ARRAY_IDX(mentions, i, mention);
        const char *way = m->by != NULL ? backup_cycle(ptemp, m->by) : NULL;

        if (way != NULL) {
            verdict = complain(s, m, apr_psprintf(ptemp, "must not lead back to where it began "
                                                  "(%s); remove one backup= on the way", way));
        }
    }
    return verdict;
}

void handoff_config_register(void)
{
    ap_hook_pre_config(begin_targets, NULL, NULL, APR_HOOK_MIDDLE);
    ap_hook_check_config(check_targets, NULL, NULL, APR_HOOK_MIDDLE);
}

/* None of them is allowed in .htaccess. */
const command_rec handoff_directives[] = {
    AP_INIT_TAKE1("SocketHandoffEnabled", set_enabled, NULL, RSRC_CONF | ACCESS_CONF,
                  "On or Off: whether applications here may hand off their client (default On)"),
    AP_INIT_ITERATE("SocketHandoffAllowedPrefix", add_prefix, NULL, RSRC_CONF,
                    "Sockets, or directories of sockets, that may be handed to (default /var/run/)"),
    AP_INIT_TAKE1("SocketHandoffConnectTimeoutMs", set_connect_timeout, NULL, RSRC_CONF,
                  "Milliseconds for reaching the daemon, retries included (default 150)"),
    AP_INIT_TAKE1("SocketHandoffSendTimeoutMs", set_send_timeout, NULL, RSRC_CONF,
                  "Further milliseconds for passing the message on (default 100)"),
    AP_INIT_TAKE1("SocketHandoffMaxRetries", set_max_retries, NULL, RSRC_CONF,
                  "Further attempts while the daemon restarts (default 2)"),
    AP_INIT_TAKE_ARGV("SocketHandoffTarget", declare_target, NULL, RSRC_CONF,
                      "A name, unix:/run/..., and key=value...: a daemon that may be handed to"),
    AP_INIT_TAKE_ARGV("SocketHandoffAllow", allow_targets, NULL, RSRC_CONF | ACCESS_CONF,
                      "Targets that applications here may use: names, All or None (default None)"),
    AP_INIT_TAKE1("SocketHandoffMaxPayload", set_max_payload, NULL, RSRC_CONF,
                  "Bytes of a response body that may be data for a daemon (default 8388608)"),
    { NULL, { NULL }, NULL, 0, RAW_ARGS, NULL }
};
