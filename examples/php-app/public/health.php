<?php
/**
 * HEAD /health.php: 200 from the daemon itself, for a load balancer that asks every few seconds.
 *
 * The request goes the whole way of a real one: Apache, PHP, the module, the daemon, and back on the client's own
 * connection. To HEAD the daemon answers with the head that a GET would begin with, and asks no backend, so this costs no
 * tokens; the daemon learns the method from the envelope. A daemon that hangs is noticed too: then no answer comes.
 *
 * An operator takes the host out of service by making a file "maintenance" beside the configuration, and back by removing
 * it. It is on a disk, not in /run: a host that is being worked on stays out of service over its reboots.
 */
declare(strict_types=1);
require __DIR__ . '/../lib.php';
require __DIR__ . '/../handoff.php';

fail_as('json');
allow_methods('HEAD'); // a GET would be a question to the backend
if (file_exists(dirname(config_path()) . '/maintenance')) {
    throw new Failure(503, 'maintenance', 'This host is out of service for now.', ['Retry-After' => '60']);
}
handoff(config()['target'], ['request_id' => 'health']);
