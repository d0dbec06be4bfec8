# shellcheck shell=bash
# Asks the host's own apt sources for what they offer besides binaries of this machine: source packages, or
# packages of another architecture. Nothing of the host changes: lists, archives and the sources file lie in a
# directory of ours, root is not needed, and the host's hooks are switched off. Sourced, never run.

# apt_here_prepare DIRECTORY deb|deb-src [ARCHITECTURE]: reads the lists; afterwards `apt_here COMMAND…` is apt.
apt_here_prepare() {
    apt_home=$1
    local type=$2 architecture=${3:-} file name
    rm -rf "${apt_home:?}"/{sources.list.d,lists}
    mkdir -p "$apt_home"/{sources.list.d,lists/partial,archives/partial}
    : >"$apt_home/status"

    # Both ways of writing sources (sources.list(5)); a limit to some architecture would hide the one wanted.
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -r "$file" ] || continue
        name=$(basename "$file")
        case $file in
            *.sources) sed -e "s/^Types:.*/Types: $type/I" -e '/^Architectures:/Id' "$file" ;;
            *) sed -nE -e "s/^deb([[:space:]])/$type\1/" -e 's/arch(itectures)?=[^] ]*//' -e '/^deb/p' "$file" ;;
        esac >"$apt_home/sources.list.d/$name"
    done

    cat >"$apt_home/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages { MetaKey "\$(COMPONENT)/binary-\$(ARCHITECTURE)/Packages"; flatMetaKey "Packages"; ShortDescription "Packages"; Description "\$(RELEASE)/\$(COMPONENT) \$(ARCHITECTURE) Packages"; flatDescription "\$(RELEASE) Packages"; Optional "0"; };
Acquire::IndexTargets::deb-src::Sources { MetaKey "\$(COMPONENT)/source/Sources"; flatMetaKey "Sources"; ShortDescription "Sources"; Description "\$(RELEASE)/\$(COMPONENT) Sources"; flatDescription "\$(RELEASE) Sources"; Optional "0"; };
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "";
Dir::State "$apt_home";
Dir::State::lists "$apt_home/lists";
Dir::State::status "$apt_home/status";
Dir::Cache "$apt_home";
Dir::Cache::archives "$apt_home/archives";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$apt_home/sources.list.d";
CONF
    if [ -n "$architecture" ]; then
        printf 'APT::Architecture "%s";\nAPT::Architectures { "%s"; };\n' "$architecture" "$architecture"
    fi >>"$apt_home/apt.conf"

    # A third party's repository without sources, or without that architecture, is no failure yet: what is
    # missing is said when it is asked for.
    apt_here apt-get -q update || echo "apt-get update had complaints; going on with what it got" >&2
}

apt_here() { "$1" -c "$apt_home/apt.conf" "${@:2}"; }
