#!/usr/bin/env bash
# The suites of the library under AddressSanitizer and LeakSanitizer, hostile peers included.
set -euo pipefail
cd "$(dirname "$0")/.."

# No tool fetches a toolchain silently. The sanitizer is there without a nightly, but not for the asking.
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0 RUSTC_BOOTSTRAP=1
export RUSTFLAGS=-Zsanitizer=address CARGO_INCREMENTAL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/asan
# Each finding ends its process: those of child processes are seen, too. What was freed is kept back for a
# while, but not so much that it looks like memory that grows without bound.
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=1:quarantine_size_mb=8

cargo test --locked --target x86_64-unknown-linux-gnu \
    --lib --test conformance --test transfer --test processes --test properties --test hostile
