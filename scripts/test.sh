#!/usr/bin/env bash
# Run the tests in two processes, file by file, after installing what is missing. Arguments go to pytest.
# In the order of their names: the longest files come first, so that no process is left waiting for the other.
# Without a RabbitMQ, and without the right to install one, its tests are left out; the summary names them, and with CI
# set the run counts as failed.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/environment.sh dev
options=()
if ! [ -x "${RABBITMQ_SCRIPTS:-/usr/lib/rabbitmq/bin}/rabbitmq-server" ]; then
    status=0
    scripts/system_package.sh rabbitmq-server || status=$?
    case $status in
        0) ;;
        3) options+=(--without-rabbitmq) ;;
        *) exit "$status" ;;
    esac
fi
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${options[@]}" "$@"
