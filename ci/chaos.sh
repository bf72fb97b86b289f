#!/usr/bin/env bash
# Chaos over both transports, of threads and of tasks, one after the other: ci/chaos.sh [SECONDS-FOR-EACH, 60] [SEED, another each time].
# What it cannot do here (no strace, no root) it says and leaves out.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
seed=${2:-$RANDOM}

if ! command -v strace >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends strace; } >/dev/null 2>&1 ||
        echo "strace cannot be installed here"
fi
cargo build --locked --release
chaos() {
    cargo run --locked --quiet --release --bin chaos -- --seed "$seed" "$@"
}
# Over the socket half of the time with a cache of threads, and half with one of tasks; half of those that
# ask it are tasks each time.
chaos --transport unix --seconds "$(((seconds + 1) / 2))"
chaos --transport unix --seconds "$((seconds / 2))" --tasks
chaos --transport mq --seconds "$seconds"
