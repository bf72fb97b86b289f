#!/usr/bin/env bash
# Compares the library's public API with the one on record, docs/public-api.txt: a change must be meant.
# `ci/public-api.sh --update` records it. Needs cargo-public-api, and installs it (two minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTDOCFLAGS="" CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/public-api
command -v cargo-public-api >/dev/null || cargo install --locked --quiet cargo-public-api@0.52.0
# rustdoc's JSON is not stable: the compiler is told to write it all the same.
RUSTC_BOOTSTRAP=1 cargo rustdoc --quiet --locked -p shmferry --lib --features tracing,loan-store,bytes,tokio -- \
    -Zunstable-options --output-format json --cap-lints allow
found=$(mktemp)
trap 'rm -f "$found"' EXIT
cargo public-api --rustdoc-json "$CARGO_TARGET_DIR/doc/shmferry.json" --omit blanket-impls,auto-trait-impls,auto-derived-impls >"$found"
if [ "${1:-}" = --update ]; then cp "$found" docs/public-api.txt; fi
diff -u docs/public-api.txt "$found" || {
    echo "the public API is not the one on record; if that is meant: ci/public-api.sh --update, and CHANGELOG.md"
    exit 1
}
echo "$(wc -l <"$found") items, as on record"
