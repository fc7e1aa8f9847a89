# What ci/test, ci/sanitize, ci/vm and ci/demo share; they source it.
# shellcheck shell=bash

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-~/.cache}/netfilterqueue-ci

# The tools of the system administrator are not on every user's path.
export PATH=$PATH:/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() {
    printf '\n==> %s\n' "$*" >&2
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# One run at a time, for all checkouts use the same environments: start the script again under a lock,
# which the processes that it leaves behind do not inherit.
with_lock() {
    if [[ -z ${NETFILTERQUEUE_CI_LOCKED-} ]]; then
        mkdir -p "$cache"
        flock --nonblock "$cache/lock" true || say "waiting for another run to end"
        NETFILTERQUEUE_CI_LOCKED=1 exec flock --close "$cache/lock" "$0" "$@"
    fi
}

# What building the library and sending packets through it takes on Debian.
# shellcheck disable=SC2034
packages=(
    gcc libc6-dev pkg-config libmnl-dev libnetfilter-queue-dev python3-dev python3-venv
    iproute2 iptables iputils-ping
)

# as_root COMMAND...: run it as root.
as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        command -v sudo >/dev/null || die "as root, run: $*"
        sudo "$@"
    fi
}

# install_packages PACKAGE...: those of these Debian packages that are missing.
install_packages() {
    local package missing=()
    if ! command -v apt-get >/dev/null; then
        say "not a Debian system: expecting what these packages hold: $*"
        return
    fi
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>&1) == installed ]] ||
            missing+=("$package")
    done
    ((${#missing[@]} > 0)) || return 0
    say "installing ${missing[*]}"
    if ! as_root apt-get update -q || ! as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q --yes --no-install-recommends "${missing[@]}"; then
        die "could not install packages; as root, run: apt-get install ${missing[*]}"
    fi
}

# "VERSION PATH" of each CPython that the library supports, oldest first, one of each minor version.
list_pythons() {
    local candidate
    for candidate in python3 python3.{9..13} ~/.pyenv/versions/*/bin/python3; do
        command -v "$candidate" >/dev/null || continue
        # A version manager's stand-in for a Python that is not there fails: it is none.
        "$candidate" -c '
import os, sys, sysconfig
supported = (3, 9) <= sys.version_info < (3, 14) and sys.implementation.name == "cpython"
if supported and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2], os.path.realpath(sys.executable))
' 2>/dev/null || true
    done | sort --version-sort --key=1,1 --unique
}

# free_threaded_python: the "VERSION PATH" of the newest one without a GIL; nothing if there is none.
free_threaded_python() {
    local candidate
    for candidate in python3.{14..15}t ~/.pyenv/versions/*t/bin/python3; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c '
import os, sys, sysconfig
if sys.version_info >= (3, 14) and sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%dt" % sys.version_info[:2], os.path.realpath(sys.executable))
' 2>/dev/null || true
    done | sort --version-sort --key=1,1 | tail --lines=1
}

# newest_python: its "VERSION PATH".
newest_python() {
    local pythons
    mapfile -t pythons < <(list_pythons)
    ((${#pythons[@]} > 0)) || die "found no CPython from 3.9 to 3.13"
    echo "${pythons[-1]}"
}

# make_environment NAME PYTHON GROUP: a virtual environment with a dependency group, made anew when
# that may have changed. Sets $environment.
make_environment() {
    local name=$1 python=$2 group=$3 key
    environment=$cache/$name
    key=$({ echo "$python $group" && "$python" -VV && cat "$root/pyproject.toml"; } | sha256sum)
    if [[ ! -f $environment/made-for || $(<"$environment/made-for") != "$key" ]]; then
        say "making the environment $environment"
        rm -rf "$environment"
        "$python" -m venv "$environment"
        # The pip that comes with a Python may be older than dependency groups.
        "$environment/bin/pip" install -qq --upgrade 'pip>=25.1'
        "$environment/bin/pip" install -qq --group "$root/pyproject.toml:$group"
        echo "$key" >"$environment/made-for"
    fi
}

# install_library: build the library with the present CFLAGS and settings and install it into
# $environment, unless that is there already. The build works on a copy, and leaves the checkout clean.
install_library() {
    local key source=$environment/source sources
    mapfile -t sources < <(
        cd "$root" && ls LICENSE.txt MANIFEST.in README.rst pyproject.toml setup.py &&
            find netfilterqueue -name '*.py*' ! -name '*.pyc' -o -name '*.pxd' -o -name '*.typed' |
            sort
    )
    key=$({ echo "${CC-}|${CFLAGS-}|${LDFLAGS-}|${NETFILTERQUEUE_DEBUG-}" &&
        cd "$root" && sha256sum "${sources[@]}"; } | sha256sum)
    if [[ ! -f $environment/built-from || $(<"$environment/built-from") != "$key" ]]; then
        say "building the library in $environment"
        rm -rf "$source" "$environment/built-from"
        mkdir "$source"
        (cd "$root" && cp --parents "${sources[@]}" "$source")
        if ! "$environment/bin/pip" install --verbose --no-build-isolation --no-deps \
            --force-reinstall "$source" >"$environment/build.log" 2>&1; then
            cat "$environment/build.log" >&2
            die "the build failed"
        fi
        echo "$key" >"$environment/built-from"
    fi
}

# build_without_warnings VERSION PYTHON: the library as users get it, in an environment with all tools.
build_without_warnings() {
    make_environment "python-$1" "$2" dev
    CFLAGS="-DNDEBUG -Wall -Wextra -Werror" install_library
    if grep '^warning: netfilterqueue/' "$environment/build.log"; then
        die "Cython warns"
    fi
}

# tests_named ARGUMENT...: arguments for a pytest that starts elsewhere than in the checkout: paths of it
# made absolute, and the whole suite added where there is none. Sets $arguments.
tests_named() {
    local argument named=false
    arguments=()
    for argument; do
        if [[ -e $root/${argument%%::*} ]]; then
            argument=$root/$argument
            named=true
        fi
        arguments+=("$argument")
    done
    $named || arguments+=("$root/tests")
}

# run_pytest ARGUMENT...: the suite, or what the arguments name of it, against the library in
# $environment, started elsewhere than in the checkout, whose package directory has no extension modules
# and must not be imported.
run_pytest() {
    local arguments
    tests_named "$@"
    (
        cd "$environment"
        export NETFILTERQUEUE_REQUIRE_NAMESPACES=1 PYTHONPYCACHEPREFIX=$environment/pycache
        timeout --foreground --kill-after=10 20m bin/pytest \
            -c "$root/pyproject.toml" --rootdir "$root" -o cache_dir="$environment/pytest-cache" \
            "${arguments[@]}" </dev/null
    )
}
