"""Debian's WordPress with MariaDB, the plugin as its README says, and a reader at Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlencode

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "examples"), str(ROOT / "tests" / "browser")]

from chain import Chain, Client, Reply, chain, complaints, readme_apache  # noqa: E402  (see above)
from chromium import start_chromium  # noqa: E402
from handoff_standin import PATIENCE  # noqa: E402  (of the module's tests, where chain.py has led to)

EXAMPLE = ROOT / "examples" / "wordpress"
README = (EXAMPLE / "README.md").read_text()
PASSWORD = "a long enough password"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
WATCH_FRAMES = """
window.lengths = [];
const look = () => {
  window.lengths.push(document.querySelector('.answer').textContent.length);
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a MariaDB of our own, with an empty database "wordpress"."""
    # Not pytest's directory: MariaDB runs as another user, and a socket's path has to be short.
    directory = Path(subprocess.check_output(["mktemp", "-d", "/tmp/handoff-mariadb-XXXXXX"], text=True).strip())
    data, path = directory / "data", directory / "socket"
    log = tmp_path_factory.mktemp("mariadb") / "log"
    shutil.chown(directory, "www-data", "www-data")
    command = ["/usr/sbin/mariadbd", "--no-defaults", "--user=www-data", f"--datadir={data}"]
    # What mariadb-install-db does; that script needs the client's package, which nothing else here does.
    tables = Path("/usr/share/mysql/mysql_system_tables.sql").read_bytes()
    data.mkdir()
    shutil.chown(data, "www-data", "www-data")
    with log.open("wb") as out:
        begin = b"CREATE DATABASE mysql;\nUSE mysql;\n"
        subprocess.run([*command, "--bootstrap"], input=begin + tables, check=True, stdout=out, stderr=out)
        server = subprocess.Popen(
            # Nobody is asked for a password; only who may enter the directory gets to the socket.
            [*command, f"--socket={path}", f"--pid-file={directory}/pid", "--skip-networking", "--skip-grant-tables"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while (failed := query(path, "CREATE DATABASE IF NOT EXISTS wordpress")) != "":
            assert server.poll() is None and time.monotonic() < deadline, failed + log.read_text()[-2000:]
            time.sleep(0.05)  # between two attempts, until the deadline
        yield path
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(directory)


def query(path: Path, sql: str) -> str:
    """What was wrong with it, or nothing."""
    code = "mysqli_report(MYSQLI_REPORT_STRICT | MYSQLI_REPORT_ERROR);"
    code += f"(new mysqli('localhost', 'root', '', '', 0, '{path}'))->query('{sql}');"
    done = subprocess.run(["php", "-r", code], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def site(database: Path) -> Iterator[Chain]:
    """WordPress as it is after its installer, with the plugin's files copied as the README says."""
    files = os.environ.get("WORDPRESS_SITE")
    assert files, "WORDPRESS_SITE is not set: script/test wordpress fetches WordPress and says where"
    target, of_the_site = readme_apache("wordpress")
    assert target.startswith("SocketHandoffTarget llm ")
    with chain(directives=of_the_site, allow="None", with_ini=True) as one:
        shutil.copytree(files, one.docroot, symlinks=True, dirs_exist_ok=True)
        (one.docroot / "wp-config.php").write_text(
            f"""<?php
define('DB_NAME', 'wordpress');
define('DB_USER', 'root');
define('DB_PASSWORD', '');
define('DB_HOST', 'localhost:{database}');
define('AUTH_KEY', 'a'); define('SECURE_AUTH_KEY', 'b'); define('LOGGED_IN_KEY', 'c'); define('NONCE_KEY', 'd');
define('WP_HTTP_BLOCK_EXTERNAL', true); // nothing here may ask the internet
define('DISABLE_WP_CRON', true);
$table_prefix = 'wp_';
require_once ABSPATH . 'wp-settings.php';
""".replace("$table_prefix", "defined('ABSPATH') || define('ABSPATH', __DIR__ . '/');\n$table_prefix")
        )
        form = {
            "weblog_title": "Bicycles & 'more'",
            "user_name": "ada",
            "admin_email": "ada@example.org",
            "pw_weak": "on",
        }
        form |= {"admin_password": PASSWORD, "admin_password2": PASSWORD, "blog_public": "0", "Submit": "Install"}
        installed = one.client().ask("POST", "/wp-admin/install.php?step=2", urlencode(form), FORM)
        assert "Success!" in installed.text, installed.text[-3000:]
        copy_the_plugin(one)
        one.httpd.take_log()
        yield one
        # WordPress of Debian 12 is older than its PHP, which says so.
        said = [line for line in complaints(one) if "Deprecated" not in line]
        assert not said, said


def copy_the_plugin(one: Chain) -> None:
    """The README's commands, with this site's directory."""
    script = README.split("```sh\n")[1].split("```")[0]
    first, _, rest = script.partition("\n")
    assert first.startswith("plugin=")
    plugin = one.docroot / "wp-content" / "plugins" / "handoff-stream"
    subprocess.run(["bash", "-eu", "-c", f"plugin={plugin}\n{rest}"], cwd=ROOT, check=True)


def in_wordpress(one: Chain, code: str) -> str:
    command = ["php", "-d", "display_errors=stderr", "-r", f"require '{one.docroot}/wp-load.php'; {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Reader:
    """Somebody at Chromium."""

    def __init__(self, driver: webdriver.Chrome, base: str) -> None:
        self.driver = driver
        self.base = base

    def log_in(self, user: str) -> None:
        self.driver.get(f"{self.base}/wp-login.php")
        self.driver.execute_script("document.getElementById('user_login').value = arguments[0]", user)
        self.driver.find_element(By.ID, "user_pass").send_keys(PASSWORD + Keys.ENTER)
        self.wait_for("return location.pathname.startsWith('/wp-admin/') && document.readyState === 'complete'")

    def wait_for(self, script: str) -> object:
        try:
            return WebDriverWait(self.driver, PATIENCE * 3, 0.05).until(lambda one: one.execute_script(script))
        except Exception as error:
            raise AssertionError(f"{script}: {self.driver.find_element(By.TAG_NAME, 'body').text[:2000]}") from error


@pytest.fixture(scope="session")
def reader(site: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """The administrator, who has activated the plugin and is logged in."""
    driver = start_chromium(tmp_path_factory.mktemp("browser"))
    one = Reader(driver, f"http://127.0.0.1:{site.port}")
    one.log_in("ada")
    driver.get(f"{one.base}/wp-admin/plugins.php")
    driver.find_element(By.ID, "activate-handoff-stream").click()
    one.wait_for("return document.getElementById('deactivate-handoff-stream') !== null")
    yield one
    driver.quit()


@pytest.fixture(scope="session")
def page(site: Chain, reader: Reader) -> str:
    """The path of a page with the shortcode, as WordPress wants it."""
    address = in_wordpress(
        site,
        "echo get_permalink(wp_insert_post(['post_type' => 'page', 'post_status' => 'publish', 'post_title' => 'Ask',"
        " 'post_content' => '[handoff_ask]']));",
    )
    assert address.startswith(f"{reader.base}/"), address
    return address.removeprefix(reader.base)


@pytest.fixture
def cookies(reader: Reader) -> dict[str, str]:
    return {cookie["name"]: cookie["value"] for cookie in reader.driver.get_cookies()}


def nonce(client: Client, page: str) -> str:
    reply = client.get(page)
    found = re.search(r'data-nonce="([0-9a-f]+)"', reply.text)
    assert found, f"{reply.status}, and no form in the page: {reply.text[-3000:]}"
    return found[1]


def ask(client: Client, token: str, prompt: str | bytes = "Which tyre?", *, at: str = "") -> Reply:
    body = urlencode({"action": "handoff_ask", "_ajax_nonce": token, "prompt": prompt})
    return client.ask("POST", f"/wp-admin/admin-ajax.php{at}", body, FORM)


def test_a_reader_sees_the_answer_being_written(reader: Reader, page: str) -> None:
    reader.driver.get(f"{reader.base}{page}")
    reader.driver.execute_script(WATCH_FRAMES)
    reader.driver.find_element(By.NAME, "prompt").send_keys("Which tyre <b>& why</b>?" + Keys.ENTER)
    reader.wait_for("return document.querySelector('.answer').textContent.length > 0")
    reader.wait_for("return document.querySelector('[role=status]').textContent === ''")
    answer = reader.driver.find_element(By.CLASS_NAME, "answer").text
    assert "Which tyre <b>& why</b>?" in answer, "shown as text, and without WordPress' slashes"
    lengths = reader.driver.execute_script("return window.lengths")
    steps = [after - before for before, after in pairwise(lengths) if after > before]
    assert len(steps) >= 3, steps  # on a machine with time for it there are a hundred; what comes at once is one


def test_apache_and_wordpress_have_done_with_it_while_it_is_written(
    site: Chain, cookies: dict[str, str], page: str
) -> None:
    client = Client(site.port, cookies)
    token = nonce(client, page)
    body = urlencode({"action": "handoff_ask", "_ajax_nonce": token, "prompt": "Why?"})
    responses = [client.open("POST", "/wp-admin/admin-ajax.php", body, FORM) for _ in range(12)]
    for response in responses:
        assert b"data: " in response.readline(), "more answers at once than Apache has workers and PHP processes"
    for response in responses:
        response.close()


def test_a_question_reaches_the_daemon_as_it_was_typed(site: Chain, cookies: dict[str, str], page: str) -> None:
    client = Client(site.port, cookies)
    question = 'O\'Reilly \\ "naïve" 日本語 🎉\r\n' + "x" * 8000
    data = ask(client, nonce(client, page), question, at="/echo").data
    assert data == {
        "messages": [
            {"role": "system", "content": "You answer questions of readers of the site \"Bicycles & 'more'\"."},
            {"role": "user", "content": question},
        ],
        "user": "ada",
    }


def test_a_second_question_ends_the_first_and_is_the_only_one_answered(reader: Reader, page: str) -> None:
    reader.driver.get(f"{reader.base}{page}")
    reader.driver.find_element(By.NAME, "prompt").send_keys("Why?" + Keys.ENTER)
    reader.wait_for("return document.querySelector('.answer').textContent.length > 60")
    reader.driver.find_element(By.NAME, "prompt").send_keys(" And how?" + Keys.ENTER)
    reader.wait_for("return document.querySelector('.answer').textContent.includes('And how?')")
    reader.wait_for("return document.querySelector('[role=status]').textContent === ''")
    answer = reader.driver.find_element(By.CLASS_NAME, "answer").text
    assert answer.count("Hello!") == answer.count("Configure a backend of type “openai”") == 1


def test_a_reader_whose_session_has_ended_is_told_to_log_in(reader: Reader, page: str) -> None:
    reader.driver.get(f"{reader.base}{page}")
    # By the protocol of Chromium's own tools: WebDriver has the cookies of this page, and not those of /wp-admin.
    kept = reader.driver.execute_cdp_cmd("Network.getAllCookies", {})
    reader.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    try:
        reader.driver.find_element(By.NAME, "prompt").send_keys("Why?" + Keys.ENTER)
        reader.wait_for("return document.querySelector('[role=status]').textContent === 'Log in again.'")
    finally:
        reader.driver.execute_cdp_cmd("Network.setCookies", kept)


def test_who_is_not_logged_in_sees_no_form_and_is_not_answered(site: Chain, page: str) -> None:
    assert "Log in to ask a question." in site.client().get(page).text
    refused = ask(site.client(), "0123456789")
    assert (refused.status, refused.text) == (400, "0")


def test_a_wrong_nonce_is_refused(site: Chain, cookies: dict[str, str], page: str) -> None:
    client = Client(site.port, cookies)
    for token in ("", "0123456789"):
        refused = ask(client, token)
        assert (refused.status, json.loads(refused.text)["error"]["type"]) == (403, "nonce")


@pytest.mark.parametrize("prompt", ["", "  ", "x" * 20_001, b"\xff", b"\xc0\x80"])
def test_what_is_no_question_or_too_long_a_one_is_refused(
    site: Chain, cookies: dict[str, str], page: str, prompt: str | bytes
) -> None:
    client = Client(site.port, cookies)
    refused = ask(client, nonce(client, page), prompt)
    assert (refused.status, json.loads(refused.text)["error"]["type"]) == (422, "prompt")


def test_a_question_that_is_a_list_is_refused(site: Chain, cookies: dict[str, str], page: str) -> None:
    client = Client(site.port, cookies)
    body = urlencode({"action": "handoff_ask", "_ajax_nonce": nonce(client, page), "prompt[]": "x"})
    assert client.ask("POST", "/wp-admin/admin-ajax.php", body, FORM).status == 422


def test_no_other_script_of_the_site_may_hand_off(site: Chain) -> None:
    (site.docroot / "other.php").write_text("<?php header('X-Socket-Handoff: llm'); header('X-Handoff-Data: {}');")
    assert site.client().get("/other.php").status == 403
    site.httpd.take_log()  # Apache says so
