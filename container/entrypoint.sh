#!/bin/sh
# What a container of the image does, by its first word; the words after it go on to the command.
#   head | worker | serve | job NAME ... | health | any other command, as it stands
set -eu

ROLE_FILE="${TMPDIR:-/tmp}/meanet-role"

fail() {
    echo "meanet: $*" >&2
    exit 64
}

# A node, or whatever joins one, needs the cluster's token: in RAY_AUTH_TOKEN, or in a file of this user alone.
need_token() {
    [ "${RAY_AUTH_MODE:-}" = token ] || fail "RAY_AUTH_MODE is '${RAY_AUTH_MODE:-}': leave it at token"
    [ -z "${RAY_AUTH_TOKEN:-}" ] || return 0
    RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-/run/secrets/ray-token}"
    export RAY_AUTH_TOKEN_PATH
    [ -r "$RAY_AUTH_TOKEN_PATH" ] && [ -s "$RAY_AUTH_TOKEN_PATH" ] \
        || fail "no token in $RAY_AUTH_TOKEN_PATH that user $(id -u) can read: mount the cluster's token there," \
            "a file of mode 0600 (-v FILE:$RAY_AUTH_TOKEN_PATH:ro), or set RAY_AUTH_TOKEN_PATH"
    case "$(stat -L -c %a "$RAY_AUTH_TOKEN_PATH")" in
        *00) ;;
        *) fail "others can read $RAY_AUTH_TOKEN_PATH: chmod 600 it" ;;
    esac
}

# Joined to a cluster, a token is needed; alone, the job starts a local Ray with a token of its own.
need_token_to_join() {
    if [ -n "${RAY_ADDRESS:-}" ]; then need_token; elif [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
        unset RAY_AUTH_MODE
    fi
}

answers() {
    wget --quiet --tries=1 --timeout=4 --output-document=/dev/null "http://127.0.0.1:$1"
}

health() {
    case "$(cat "$ROLE_FILE" 2>/dev/null)" in
        head) answers 8265/api/gcs_healthz && answers 52365/api/local_raylet_healthz ;;
        worker) answers 52365/api/local_raylet_healthz ;;
        serve) answers 8000/v2/health/ready ;;
        job) ;;  # it ends when it fails
        *) fail "no role has been started here" ;;
    esac
}

role="${1:-}"
[ -n "$role" ] || fail "say what to do: head, worker, serve, job NAME ..., or a command"
case "$role" in
    head | worker | serve | job)
        shift
        echo "$role" > "$ROLE_FILE"
        ;;
esac

case "$role" in
    head)
        need_token
        exec ray start --head --block --port=6379 --dashboard-host=0.0.0.0 "$@"
        ;;
    worker)
        [ -n "${RAY_ADDRESS:-}" ] || fail "a worker joins a head: set RAY_ADDRESS=HOST:6379"
        need_token
        exec ray start --block --address="$RAY_ADDRESS" "$@"
        ;;
    serve)
        need_token_to_join
        exec python -m serve_apps --host 0.0.0.0 "$@"
        ;;
    job)
        [ "$#" -gt 0 ] || fail "which job? For example: job train digits"
        need_token_to_join
        name="$1"
        shift
        exec python -m "jobs.$name" "$@"
        ;;
    health) health ;;
    *) exec "$@" ;;
esac
