<?php
/**
 * Plugin Name: Handoff stream
 * Description: [handoff_ask] shows a form whose answer a daemon streams; WordPress is done with it at once.
 * Version: 0.1.0
 * Requires PHP: 8.2
 * License: Apache-2.0
 */
declare(strict_types=1);

use SocketHandoff\SocketHandoff;

defined('ABSPATH') || exit;
require_once __DIR__ . '/SocketHandoff.php'; // examples/php-helper, or Composer's autoload.php

const HANDOFF_QUESTION_MAX = 20000; // bytes

// Without a twin called wp_ajax_nopriv_…: whoever is not logged in gets WordPress' own 400.
add_action('wp_ajax_handoff_ask', static function (): void {
    if (!check_ajax_referer('handoff_ask', false, false)) {
        wp_send_json(['error' => ['type' => 'nonce', 'message' => __('This page is too old. Reload it.')]], 403);
    }
    $question = is_string($_POST['prompt'] ?? null) ? trim(wp_unslash($_POST['prompt'])) : '';
    if ($question === '' || strlen($question) > HANDOFF_QUESTION_MAX || preg_match('//u', $question) !== 1) {
        wp_send_json(['error' => ['type' => 'prompt', 'message' => __('Ask something, not too long.')]], 422);
    }
    $site = wp_specialchars_decode(get_bloginfo('name'), ENT_QUOTES); // it is kept as HTML: "Ada &amp; Bob"
    $instructions = sprintf('You answer questions of readers of the site "%s".', $site);
    SocketHandoff::to('llm')->with([
        'messages' => [['role' => 'system', 'content' => $instructions], ['role' => 'user', 'content' => $question]],
        'user' => wp_get_current_user()->user_login, // for the daemon's limits and log
    ])->send();
});

add_shortcode('handoff_ask', static function (): string {
    if (!is_user_logged_in()) {
        return '<p>' . esc_html__('Log in to ask a question.') . '</p>';
    }
    return sprintf(
        '<form class="handoff-ask" data-url="%s" data-nonce="%s" data-logged-out="%s">'
        . '<input name="prompt" aria-label="%s" required> <button>%s</button>'
        . '<p role="status"></p><div class="answer" style="white-space: pre-wrap"></div></form>'
        . '<script type="module" src="%s"></script>',
        esc_url(admin_url('admin-ajax.php')),
        esc_attr(wp_create_nonce('handoff_ask')),
        esc_attr__('Log in again.'),
        esc_attr__('Your question'),
        esc_html__('Ask'),
        esc_url(plugins_url('ask.js', __FILE__)),
    );
});
