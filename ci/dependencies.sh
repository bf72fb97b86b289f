#!/usr/bin/env bash
# Counts the packages of the library without its features, itself included: 15 lines of `cargo tree` at most.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=$(cargo tree --locked -p shmferry --no-default-features -e normal --prefix none | sort -u)
count=$(wc -l <<<"$packages")
echo "$count lines:"
echo "$packages"
[ "$count" -le 15 ]
