#!/usr/bin/env bash
# The library's suites as compiled for 64-bit ARM, whose instructions qemu carries out. Its weaker order
# of memory is not emulated: on an x86 machine the atomics' code is run, but nothing comes out of order.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/aarch64 CARGO_INCREMENTAL=0

lacking=()
[ -e /usr/lib/rustlib/src/rust/library ] || lacking+=(rustc-web cargo-web rust-web-src)
command -v aarch64-linux-gnu-gcc >/dev/null || lacking+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
command -v qemu-aarch64 >/dev/null || lacking+=(qemu-user)
if [ ${#lacking[@]} -gt 0 ]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${lacking[@]}" >/dev/null
fi

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(--lib --test conformance --test transfer --test rings)
RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 PROPTEST_CASES=${PROPTEST_CASES:-50} \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
    /usr/bin/cargo test --locked -p shmferry -Zbuild-std --target aarch64-unknown-linux-gnu "${suites[@]}"
