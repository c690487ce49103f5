#!/usr/bin/env bash
# Install Debian packages where this user may: as root, or with a sudo that asks no password.
# Usage: scripts/system_package.sh PACKAGE...
# Exits 0 when all are installed, 3 when it may not install (and prints the one command that would).
set -euo pipefail

missing=()
for package in "$@"; do
    # The status, not the name alone: a removed package that left its settings behind is listed too.
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]; then
        missing+=("$package")
    fi
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null || [ -n "${NO_SYSTEM_PACKAGES:-}" ]; then
    as_root=()
    may_install=no
elif [ "$(id -u)" = 0 ]; then
    as_root=()
    may_install=yes
elif sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
    may_install=yes
else
    as_root=()
    may_install=no
fi

if [ $may_install = no ]; then
    echo "Not installed: ${missing[*]}. To install: sudo apt-get install ${missing[*]}" >&2
    exit 3
fi

echo "Installing ${missing[*]} with apt-get …"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${as_root[@]}" apt-get update </dev/null >"$log" 2>&1 || { cat "$log" >&2; echo "apt-get update failed" >&2; exit 1; }
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" \
    </dev/null >"$log" 2>&1 || { cat "$log" >&2; echo "apt-get install ${missing[*]} failed" >&2; exit 1; }

# The package starts a broker for the whole machine. The tests start private ones, so the one that came with this
# installation is switched off again; one that was there before is not touched.
if [[ " ${missing[*]} " == *" rabbitmq-server "* ]] && [ -d /run/systemd/system ]; then
    "${as_root[@]}" systemctl disable --now rabbitmq-server >/dev/null 2>&1 || true
fi
