<?php
/** GET /plain.php: an ordinary page without a session. It answers at once while any number of streams run. */
declare(strict_types=1);
require __DIR__ . '/../lib.php';
require __DIR__ . '/../page.php';

fail_as('html');
allow_methods('GET', 'HEAD');
page_top('Plain page · Handoff', 'narrow');
?>
<main class="card">
  <h1>A plain page</h1>
  <p>PHP wrote this at <?= gmdate('H:i:s') ?> UTC. No stream was in its way.</p>
</main>
<?php
page_end();
