"""What the roles leave on a host: units, files, a sandbox that bites, and nothing more to change."""

from __future__ import annotations

import json
import re

import pytest
from exposure import assert_baseline
from operator_runs import playbook
from testinfra.host import Host

# What systemd-analyze(1) calls exposure, 0.0 (best) to 10.0; a backend behind a network costs half a point and more.
EXPOSURE_LIMIT, EXPOSURE_LIMIT_WITH_NETWORK = 1.0, 2.0

# What makes the daemon's unit a daemon; the probe keeps everything else.
NOT_IN_THE_PROBE = r"(Exec|Restart|Watchdog|Runtime)\w*=|(Type|Sockets|NotifyAccess|Requires|After|Also)="

# Run inside the unit's own property set: each line tries one thing the daemon has no business doing.
SANDBOX_PROBE = r"""
import ctypes, json, mmap, os, socket, sys

def attempt(action):
    try:
        action()
        return "allowed"
    except (OSError, ValueError, ImportError) as error:
        return type(error).__name__

def connect():
    with socket.create_connection(("192.0.2.1", 9), timeout=2):
        pass

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

def see_others():
    mine = str(os.getuid())
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if str(os.stat("/proc/" + pid).st_uid) != mine:
            return
    raise ValueError("nobody")

def connect_to(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(path)

def set_user_id_file():
    path = "/dev/shm/handoff-probe"
    with open(path, "w"):
        pass
    try:
        os.chmod(path, 0o4755)
    finally:
        os.unlink(path)

def priority():
    os.setpriority(os.PRIO_PROCESS, 0, 5)

def write_and_execute():
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()

print(json.dumps({
    "uid": os.getuid(),
    "capabilities": next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")),
    "new_privileges": next(line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")),
    "write /etc": attempt(lambda: open("/etc/handoff-probe", "w")),
    "write a release": attempt(lambda: open("/opt/streaming-daemon/current/handoff-probe", "w")),
    "write its configuration": attempt(lambda: open("/etc/streaming-daemon/config.toml", "a")),
    "read a home": attempt(lambda: os.listdir("/home/deploy")),
    "read root's home": attempt(lambda: os.listdir("/root")),
    "read shadow": attempt(lambda: open("/etc/shadow")),
    "see pid 1": attempt(lambda: os.stat("/proc/1/status")),
    "connect to the network": attempt(connect),
    "internet socket": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()),
    "IPv6 socket": attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()),
    "netlink socket": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "see other people's processes": attempt(see_others),
    "signal pid 1": attempt(lambda: os.kill(1, 0)),
    "the host's /tmp": attempt(lambda: os.stat("/tmp/handoff-probe-was-here")),
    "read the application's configuration": attempt(lambda: open("/etc/handoff-app/config.php")),
    "list the credentials": attempt(lambda: os.listdir("/etc/streaming-daemon/credentials")),
    "read Apache's log": attempt(lambda: open("/var/log/apache2/error.log")),
    "talk to PHP-FPM": attempt(lambda: connect_to("/run/php/php-fpm.sock")),
    "kernel settings": attempt(lambda: open("/proc/sys/kernel/hostname", "a")),
    "control groups": attempt(lambda: os.mkdir("/sys/fs/cgroup/handoff-probe")),
    "become root": attempt(lambda: os.setuid(0)),
    "change its root": attempt(lambda: os.chroot("/opt")),
    "a file that makes others its user": attempt(set_user_id_file),
    "set its priority": attempt(priority),
    "another personality": attempt(lambda: call("personality", 0x0040000)),
    "packet socket": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "mount": attempt(lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None)),
    "unshare": attempt(lambda: call("unshare", 0x10000000)),
    "ptrace": attempt(lambda: call("ptrace", 16, 1, None, None)),
    "set the clock": attempt(lambda: call("settimeofday", ctypes.byref((ctypes.c_long * 2)(1, 0)), None)),
    "writable and executable memory": attempt(write_and_execute),
    "import its code": attempt(lambda: __import__("streaming_daemon")),
}))
"""


# What any user of the host may do: here nothing but the sandbox stands in the way, so these show that it is there.
DENIED_BY_THE_SANDBOX_ALONE = {
    "see pid 1",
    "internet socket",
    "IPv6 socket",
    "netlink socket",
    "see other people's processes",
    "the host's /tmp",
    "a file that makes others its user",
    "set its priority",
    "writable and executable memory",
}


def test_the_socket_belongs_to_systemd_and_apache_alone_may_connect(host: Host) -> None:
    socket = host.file("/run/streaming-daemon.sock")
    assert socket.is_socket and (socket.user, socket.group, socket.mode) == ("root", "www-data", 0o660)
    assert host.service("streaming-daemon.socket").is_enabled
    assert host.service("streaming-daemon.socket").is_running


def test_the_module_is_loaded_and_configured(host: Host) -> None:
    assert "socket_handoff_module" in host.check_output("apache2ctl -M")
    assert host.file("/usr/lib/apache2/modules/mod_socket_handoff.so").exists
    assert host.run("apache2ctl configtest").rc == 0


@pytest.mark.parametrize("unit", ["streaming-daemon.service"])
def test_exposure_by_the_hosts_own_systemd(host: Host, unit: str) -> None:
    report = host.run(f"systemd-analyze security --no-pager {unit}").stdout
    score = re.search(r"Overall exposure level for .*: ([0-9.]+)", report)
    assert score, report
    alone = "PrivateNetwork=yes" in host.check_output(f"systemctl cat {unit}")
    assert float(score[1]) <= (EXPOSURE_LIMIT if alone else EXPOSURE_LIMIT_WITH_NETWORK), report
    print(f"{unit}: exposure {score[1]}")


def test_no_directive_of_the_sandbox_is_lost(host: Host, prefork: bool) -> None:
    """The score alone would let one directive go for another. The prefork hosts have a backend of type exec besides."""
    assert_baseline(host, "streaming-daemon.service", "-with-programs" if prefork else "")


def probe_result(host: Host, directives: str) -> dict[str, str]:
    """Run the probe once as a service with these lines; return what it found out."""
    probe, name = "/opt/streaming-daemon/sandbox-probe.py", "handoff-sandbox-probe.service"
    text = directives.replace("[Service]", f"[Service]\nType=oneshot\nExecStart=/usr/bin/python3 {probe}", 1)
    host.check_output(f"cat >{probe} <<'PROBE'\n{SANDBOX_PROBE}\nPROBE")
    host.check_output(f"cat >/run/systemd/system/{name} <<'UNIT'\n{text}\nUNIT")
    host.check_output("touch /tmp/handoff-probe-was-here")
    try:
        host.check_output("systemctl daemon-reload")
        started = host.run(f"systemctl start {name}")
        output = host.check_output(f"journalctl --sync; journalctl -u {name} -o cat --no-pager")
        assert started.rc == 0, output[-2000:]
        found: dict[str, str] = json.loads(
            next(line for line in output.splitlines()[::-1] if line.startswith('{"uid"'))
        )
        return found
    finally:
        host.check_output(
            f"rm {probe} /run/systemd/system/{name} /tmp/handoff-probe-was-here && systemctl daemon-reload"
        )


def test_the_sandbox_bites(host: Host) -> None:
    """Properties can be set and not enforced (containers without CAP_SYS_ADMIN): look at effects, from inside."""
    unit = host.check_output("systemctl cat streaming-daemon.service")
    lines = [line for line in unit.splitlines() if not re.match(NOT_IN_THE_PROBE, line)]
    seen = probe_result(host, "\n".join(lines))
    assert seen.pop("uid") != 0
    assert int(seen.pop("capabilities"), 16) == 0
    assert seen.pop("new_privileges") == "1"
    assert seen.pop("import its code") == "allowed", "the probe ran, but not where the daemon runs"
    assert [what for what, result in seen.items() if result == "allowed"] == [], seen


def test_without_the_sandbox_the_same_probe_gets_through(host: Host) -> None:
    seen = probe_result(host, "[Service]\nUser=streaming-daemon\n")
    assert {what for what in DENIED_BY_THE_SANDBOX_ALONE if seen[what] != "allowed"} == set(), seen


def test_the_daemon_runs_as_nobody_in_particular(host: Host) -> None:
    pid = host.check_output("systemctl show -p MainPID --value streaming-daemon")
    status = host.check_output(f"cat /proc/{pid}/status")
    assert int(re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)[1]) not in (0, 33)  # type: ignore[index]


def test_check_mode_on_the_converged_host_changes_nothing(name: str) -> None:
    result = playbook(name, "--check", "--diff")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    recap = re.search(rf"^{name}\s*: .*changed=(\d+).*failed=(\d+)", result.stdout, re.MULTILINE)
    assert recap and recap.groups() == ("0", "0"), result.stdout[-4000:]


def test_no_password_stands_in_a_readable_file(host: Host) -> None:
    found = host.run("runuser -u nobody -- grep -rl chain-test-passwor[d] /etc /opt /var/www /run /var/log 2>/dev/null")
    assert found.stdout == ""
    assert host.run("grep -rl chain-test-passwor[d] /etc /opt /var/www 2>/dev/null").stdout == ""
