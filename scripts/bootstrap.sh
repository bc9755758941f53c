#!/bin/sh
# Makes a bare machine ready: system packages, virtual environment, editable install with the
# native build. Does nothing, quickly, when nothing it depends on has changed.
#
#   PYTHON  interpreter to build with (python3)      VENV  virtual environment (.venv)
#   --native  only build the native module again, verbosely; fail where it does not build
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

say() { printf 'mlx-serving: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# What an install depends on; a different compiler or switch is a different install too.
fingerprint() {
    {
        cat pyproject.toml constraints.txt CMakeLists.txt scripts/bootstrap.sh
        find native -type f | LC_ALL=C sort | xargs cat
        find mlx_serving -name '*.py' | LC_ALL=C sort  # an editable install maps each module to its file
        printf '%s|%s|%s|%s' "$PWD" "$PYTHON" "${CXX:-}" "${MLX_SERVING_NO_NATIVE_BUILD:-}"
    } | cksum
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif have sudo && sudo -n true 2>/dev/null; then sudo "$@"
    else return 1
    fi
}

apt_updated=
apt_install() {
    have apt-get || return 1
    if [ -z "$apt_updated" ]; then
        as_root apt-get update -qq >&2 || return 1
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

need_python() {
    have "$PYTHON" || die "no $PYTHON on the PATH; set PYTHON=/path/to/python3 (3.11 or newer)"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is older than 3.11; set PYTHON=/path/to/a/newer/python3"
    # Debian keeps venv and the headers in packages of their own.
    if ! "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        apt_install python3-venv || die "the venv module is missing; install python3-venv"
    fi
    if ! "$PYTHON" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))'; then
        apt_install python3-dev || say "no Python headers (python3-dev): the native module can't be built"
    fi
}

need_redis() {
    have redis-server && return
    say "installing redis-server"
    if [ "$(uname -s)" = Darwin ]; then
        have brew || die "no redis-server and no Homebrew; see https://brew.sh, then: brew install redis"
        brew install --quiet redis >&2
    else
        apt_install redis-server || die "no redis-server; install it (Debian: apt-get install redis-server)"
    fi
}

need_openblas() {
    [ "$(uname -s)" = Linux ] || return 0
    PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0 ' && return
    say "installing OpenBLAS"
    apt_install libopenblas0-pthread || say "no OpenBLAS (libopenblas0-pthread): MLX will be some ten times slower"
}

report_native() {
    if "$VENV/bin/python" -c 'import mlx_serving._native' 2>/dev/null; then
        say "native module: built"
    else
        say "native module: NOT built, the Python twins are used (make native shows why)"
        return 1
    fi
}

if [ "${1:-}" = --native ]; then
    [ -x "$VENV/bin/python" ] || die "run make install first"
    "$VENV/bin/python" -m pip install -v --no-deps --force-reinstall -c constraints.txt -e .
    report_native
    exit
fi

stamp=$VENV/.mlx-serving-install
wanted=$(fingerprint)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && have redis-server; then
    exit 0
fi

need_python
need_redis
need_openblas
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
say "installing into $VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
report_native || true
printf '%s\n' "$wanted" >"$stamp"
