# shellcheck shell=bash
# What demo, test and the other scripts share: where things are, how a step is shown, how it fails.
# Sourced, never run. Everything that is made lives below .cache; nothing else of the machine is
# touched but packages (apt) and containers whose names begin with "socket-handoff-".
set -euo pipefail
unset CDPATH # with it cd prints the directory, and `root` would have two lines

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034  # used by the scripts that source this file
{
    cache=$root/.cache
    venv=$cache/venv
    ssh_dir=$cache/ssh
    network=socket-handoff
    name_prefix=socket-handoff-
}
mkdir -p "$cache/log"

# The sudo of a user who is not root; root needs none.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then command "$@"; else sudo --preserve-env=CONTAINERS_CONF "$@"; fi
}

# Rootful podman also for a sudo user: systemd as PID 1 with a working sandbox, and container addresses that the
# host can reach, are not to be had rootless on every Debian kernel.
podman() { as_root podman "$@"; }

say() { printf '%s\n' "$*"; }

# die MESSAGE [WHAT TO DO]: every failure says what, why and what to do.
die() {
    printf '\nfailed: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'what to do: %s\n' "$2" >&2
    exit 1
}

# The path of the checkout ends up in ssh and Ansible settings that know no common way of quoting.
[[ $root =~ ^[A-Za-z0-9/._@+=-]+$ ]] || die "the checkout's path '$root' has characters other than A-Z a-z 0-9 / . _ @ + = -" \
    "move the checkout to a path without spaces and quotes"

# step NAME HINT COMMAND…: run a long command quietly, with its seconds ticking; its output goes to .cache/log/NAME.log
# and its last lines are shown where it fails.
step() {
    local name=$1 hint=$2 log began rc=0 pid
    shift 2
    log=$cache/log/${name// /-}.log
    began=$SECONDS
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\033[K  %-34s %4ss  %.60s' "$name" "$((SECONDS - began))" "$(tail -n 1 "$log" | tr -dc '[:print:]')"
        elif [ $(((SECONDS - began) % 20)) -eq 19 ]; then
            printf '  %-34s %4ss …\n' "$name" "$((SECONDS - began))"
        fi
        # A second is the tick of this display, not a wait for something: `wait` below does the waiting.
        sleep 1
    done
    wait "$pid" || rc=$?
    [ ! -t 1 ] || printf '\r\033[K'
    if [ "$rc" -ne 0 ]; then
        printf '  %-34s %4ss  FAILED (exit %s)\n' "$name" "$((SECONDS - began))" "$rc"
        printf '%s\n' "--- the last lines of ${log#"$root"/}" >&2
        tail -n 30 "$log" >&2
        die "$name" "$hint"
    fi
    printf '  %-34s %4ss  done\n' "$name" "$((SECONDS - began))"
}

debian_release() {
    # shellcheck disable=SC1091  # the host's own file
    (. /etc/os-release && printf '%s' "${VERSION_ID:-unknown}")
}

# The one place that knows of unusual machines; see script/containers/README.md.
select_container_settings() {
    [ -z "${CONTAINERS_CONF:-}" ] || return 0
    if [ -d /sys/fs/cgroup/unified ] || ! prlimit --pid $$ --nofile="$(ulimit -Hn):$(($(ulimit -Hn) + 1))" 2>/dev/null; then
        export CONTAINERS_CONF=$root/script/containers/restricted.conf
    fi
}
select_container_settings
