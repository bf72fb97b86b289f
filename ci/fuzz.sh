#!/usr/bin/env bash
# Fuzzes each target of fuzz/ for SECONDS (15), from its corpus, under AddressSanitizer. Needs a C++
# compiler. What is found stays in fuzz/artifacts; the corpus is not added to.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-15}

# No tool fetches a toolchain silently. The sanitizer is there without a nightly, but not for the asking.
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0 RUSTC_BOOTSTRAP=1
# What cargo-fuzz would pass, without cargo-fuzz.
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
-Ccodegen-units=1"
target=x86_64-unknown-linux-gnu
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/fuzz

command -v c++ >/dev/null || { echo "c++ is needed, for libFuzzer: install g++"; exit 1; }
cargo build --locked --release --manifest-path fuzz/Cargo.toml --target "$target"

TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
mkdir -p fuzz/artifacts
for corpus in fuzz/corpus/*/; do
    name=$(basename "$corpus")
    mkdir "$TMPDIR/$name"
    log=$TMPDIR/$name.log
    if ! "$CARGO_TARGET_DIR/$target/release/$name" "$TMPDIR/$name" "$corpus" -max_total_time="$seconds" \
        -max_len=4200 -timeout=20 -rss_limit_mb=2048 -artifact_prefix="fuzz/artifacts/$name-" >"$log" 2>&1; then
        tail -60 "$log"
        echo "$name fails"
        exit 1
    fi
    echo "$name: $(grep '^Done' "$log")"
done
