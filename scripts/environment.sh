#!/usr/bin/env bash
# Make .venv and install into it what is missing; a second call with nothing changed installs nothing.
# Usage: scripts/environment.sh PROFILE
#   dev              everything that tests, linters and type checks need
#   demo-FRAMEWORK   what the demo needs (torch, lightning or keras)
# PYTHON names another interpreter than the one found.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:?profile missing: dev, demo-torch, demo-lightning or demo-keras}
constraints=constraints/cpu-py311.txt
case $profile in
    dev) wanted=('.[torch,lightning,keras,sandbox,fast,demo,dev]' tensorflow-cpu jax) ;;
    demo-torch) wanted=('.[demo]') ;;
    demo-lightning) wanted=('.[demo,lightning]') ;;
    demo-keras) wanted=('.[demo,keras]') ;;
    *) echo "Unknown profile $profile: expected dev, demo-torch, demo-lightning or demo-keras" >&2; exit 2 ;;
esac

usable() {
    # Run it: a name on the path may be a stub that only says how to install the real one.
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then
            break
        fi
    done
    echo "No usable Python: expected 3.11 or newer as python3.11 or python3, found ${PYTHON:-$(python3 --version 2>&1 || true)}." >&2
    echo "Install one (Debian: sudo apt-get install python3.11 python3.11-venv), or name it: make … PYTHON=/path/to/python3.11" >&2
    exit 1
}

make_venv() {
    local python
    python=$(find_python)
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Debian keeps the part of Python that makes environments in a package of its own.
        scripts/system_package.sh "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    echo "Making .venv with $("$python" --version) …"
    "$python" -m venv --clear .venv
}

# What was installed from what: a change in either file, or of the interpreter, makes the stamp stale.
fingerprint() {
    { cat pyproject.toml "$constraints"; .venv/bin/python -VV; } | cksum
}
fresh() {
    [ -f ".venv/.installed-$1" ] && [ "$(cat ".venv/.installed-$1")" = "$(fingerprint)" ]
}

# An environment whose making was cut off, or whose interpreter has gone, is made anew.
.venv/bin/python -c 'import pip' 2>/dev/null || make_venv
if fresh dev || fresh "$profile"; then
    exit 0
fi
echo "Installing ${wanted[*]} into .venv (the first time this takes a few minutes) …"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e "${wanted[@]}"
fingerprint >".venv/.installed-$profile"
