#!/usr/bin/env bash
# ThreadSanitizer over the suites whose two sides are threads of one process. Std must be instrumented,
# too, or there are false reports: hence a compiler that brings its source (Debian: rust-web-src).
#
# It takes the two mappings of one segment for different memory, so that it sees no race on a slot
# or a header between the two sides: that is loom's (ci/loom.sh). It sees pool, links, workers, queues, and
# what several threads of one side do.
#
# One test at a time: the library maps memory by system calls that the sanitizer does not see, and so an
# address that one test has given back and another was given looks like a race between the two.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/tsan CARGO_INCREMENTAL=0

lacking=()
[ -e /usr/lib/rustlib/src/rust/library ] || lacking+=(rustc-web cargo-web rust-web-src)
command -v ld.lld >/dev/null || lacking+=(lld)   # GNU ld fails on the runtime
if [ ${#lacking[@]} -gt 0 ]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${lacking[@]}" >/dev/null
fi

# Debian's compiler comes without the sanitizer's runtime. That of the usual toolchain does, as long as
# both have the same major version of LLVM.
llvm() { "$1" -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p'; }
runtime=lib/rustlib/x86_64-unknown-linux-gnu/lib/librustc-stable_rt.tsan.a
if [ ! -e "/usr/$runtime" ]; then
    [ "$(llvm rustc)" = "$(llvm /usr/bin/rustc)" ] || { echo "the compilers' versions of LLVM differ"; exit 1; }
    ln -s "$(rustc --print sysroot)/$runtime" "/usr/$runtime"
fi

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(--lib --test conformance --test transfer --test properties --test rings)
RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 \
    RUSTFLAGS="-Zsanitizer=thread -Clink-arg=-fuse-ld=lld" \
    TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1" PROPTEST_CASES=${PROPTEST_CASES:-200} \
    /usr/bin/cargo test --locked -p shmferry -Zbuild-std --target x86_64-unknown-linux-gnu "${suites[@]}" -- --test-threads 1
