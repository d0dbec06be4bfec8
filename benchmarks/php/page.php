<?php
/**
 * The page of a visitor who wants no stream.
 */
declare(strict_types=1);
require __DIR__ . '/user.php';
header('Content-Type: text/html; charset=utf-8');
?>
<!DOCTYPE html>
<html lang="en">
<title>Orders of <?= htmlspecialchars($_COOKIE['user']) ?></title>
<table>
<?php foreach (range(1, 20) as $number): ?>
<tr><td><?= $number ?></td><td><?= date('Y-m-d', 86400 * $number) ?></td><td><?= number_format($number * 19.9, 2) ?></td></tr>
<?php endforeach ?>
</table>
</html>
