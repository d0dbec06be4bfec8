/* SPDX-License-Identifier: Apache-2.0
 * Copyright 2026 The socket_handoff authors
 */
#include "handoff_origin.h"
#include "tap.h"

#include <stddef.h>

#define APPLICATION HANDOFF_ORIGIN_APPLICATION
#define FILE_ HANDOFF_ORIGIN_FILE
#define CLIENT HANDOFF_ORIGIN_CLIENT
#define BACKEND HANDOFF_ORIGIN_BACKEND

enum { NOT, REVERSE, FORWARD };

int main(void)
{
    static const struct {
        handoff_origin origin;
        int proxied;
        const char *handler;
        const char *type;
        const char *filename;
    } cases[] = {
        { APPLICATION, NOT, NULL, NULL, NULL },
        { APPLICATION, NOT, "", "", "" },
        { APPLICATION, NOT, "application/x-httpd-php", NULL, "/srv/index.php" },
        { APPLICATION, NOT, "cgi-script", "text/html", "/srv/proxy:" },
        { APPLICATION, NOT, NULL, "text/html; charset=utf-8", "/srv/index.html" },

        { FILE_, NOT, "send-as-is", NULL, "/srv/a" },
        { FILE_, NOT, "httpd/send-as-is", NULL, "/srv/a" },
        { FILE_, NOT, NULL, "httpd/send-as-is", "/srv/a" },
        { FILE_, NOT, NULL, "httpd/send-as-is; charset=utf-8", "/srv/a" },
        { FILE_, NOT, NULL, "httpd/send-as-is x", "/srv/a" },
        { FILE_, NOT, NULL, "send-as-is;", "/srv/a" },
        { APPLICATION, NOT, "send-as-is;", NULL, "/srv/a" },
        { APPLICATION, NOT, "send-as-isnt", NULL, "/srv/a" },
        { APPLICATION, NOT, "send-as-i", NULL, "/srv/a" },
        { APPLICATION, NOT, "cgi-script", "httpd/send-as-is", "/srv/a" },
        { CLIENT, NOT, "reflector", NULL, "/srv/a" },
        { CLIENT, NOT, NULL, "reflector;x", "/srv/a" },
        { APPLICATION, NOT, "reflectors", NULL, "/srv/a" },

        { APPLICATION, NOT, "proxy:fcgi://127.0.0.1:9000", NULL, "/srv/a.php" },
        { APPLICATION, NOT, "proxy:FCGI://127.0.0.1:9000", NULL, "/srv/a.php" },
        { APPLICATION, NOT, "proxy:unix:/run/php/fpm.sock|fcgi://localhost", NULL, "/srv/a.php" },
        { APPLICATION, NOT, "proxy:UNIX:/run/php/fpm.sock|fcgi://localhost", NULL, "/srv/a.php" },
        { BACKEND, NOT, "proxy:http://127.0.0.1", NULL, "/srv/a.php" },
        { BACKEND, NOT, "proxy:unix:/run/b.sock|http://localhost", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:unix:/run/b.sock|http://x|fcgi://x", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:unix:/run/fcgi://b.sock", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:unix:", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:unix:|", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:fcgi:/", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:scgi://x", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:uwsgi://x", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:ajp://x", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy:balancer://fcgi://x", NULL, "/srv/a" },
        { BACKEND, NOT, "proxy-server", NULL, "/srv/a" },
        { APPLICATION, NOT, "proxy-servers", NULL, "/srv/a" },
        { APPLICATION, NOT, "prox", NULL, "/srv/a" },

        { APPLICATION, REVERSE, "proxy-server", NULL, "proxy:fcgi://127.0.0.1:9000/a.php" },
        { BACKEND, REVERSE, "proxy-server", NULL, "proxy:http://127.0.0.1/" },
        { BACKEND, REVERSE, "proxy:fcgi://x", NULL, "proxy:http://127.0.0.1/" },
        { BACKEND, NOT, "proxy:fcgi://x", NULL, "proxy:http://127.0.0.1/" },
        { APPLICATION, NOT, "proxy:http://x", NULL, "proxy:fcgi://127.0.0.1/" },
        { BACKEND, REVERSE, "proxy:fcgi://x", NULL, "/srv/a.php" },
        { BACKEND, REVERSE, NULL, NULL, NULL },
        { BACKEND, FORWARD, "proxy-server", NULL, "proxy:fcgi://127.0.0.1/" },
        { BACKEND, FORWARD, NULL, NULL, "proxy:http://elsewhere/" },
        { FILE_, REVERSE, "send-as-is", NULL, "proxy:fcgi://127.0.0.1/" },
    };
    size_t i;

    for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        handoff_origin_names names = { cases[i].handler, cases[i].type, cases[i].filename,
                                       cases[i].proxied != NOT, cases[i].proxied == FORWARD };
        handoff_origin origin = handoff_origin_of(&names);

        ok(origin == cases[i].origin, "handler \"%s\", type \"%s\", file \"%s\", proxied %d: %d",
           names.handler != NULL ? names.handler : "-",
           names.content_type != NULL ? names.content_type : "-",
           names.filename != NULL ? names.filename : "-", cases[i].proxied, (int)origin);
    }
    return tap_end();
}
