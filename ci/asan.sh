#!/usr/bin/env bash
# AddressSanitizer and LeakSanitizer over the library's suites: reads and writes out of bounds or after
# an end, and memory that nobody frees. Processes that a test kills are not asked for leaks.
#
#   ci/asan.sh                             all suites, the programs' included
#   ci/asan.sh --lib --test transfer       these
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/asan CARGO_INCREMENTAL=0

# No doctests, which would run without the sanitizer. All programs are built if all tests are: the demo
# looks for those of another package. `RUSTC_BOOTSTRAP` lets a stable compiler have the sanitizer.
suites=("$@") programs=()
if [ $# -eq 0 ]; then
    suites=(--lib) programs=(--bins)
    for file in $(basename -as .rs {,examples/,tools/}tests/*.rs | sort -u); do suites+=(--test "$file"); done
fi
with_sanitizer() {
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" PROPTEST_CASES=${PROPTEST_CASES:-200} \
        cargo "$1" --locked --target x86_64-unknown-linux-gnu "${@:2}"
}
test() { with_sanitizer test --no-fail-fast "$@"; }

# Two suites ask how much memory something cost: there, freed blocks are not kept back. And the sanitizer's own
# shadow does not fit the limits on addresses that some tests set.
lean="hostile sizes" unfit=(a_pool_beyond_the_limit_on_addresses a_cache_without_room_for_a_pool)
others=() memory=()
for ((i = 0; i < ${#suites[@]}; i++)); do
    if [ "${suites[i]}" = --test ] && [[ " $lean " == *" ${suites[i + 1]} "* ]]; then
        memory+=(--test "${suites[i + 1]}")
        i=$((i + 1))
    else
        others+=("${suites[i]}")
    fi
done
if [ ${#others[@]} -gt 0 ]; then
    if [ ${#programs[@]} -gt 0 ]; then with_sanitizer build "${programs[@]}"; fi
    test "${others[@]}"
fi
if [ ${#memory[@]} -gt 0 ]; then
    ASAN_OPTIONS=quarantine_size_mb=0:thread_local_quarantine_size_kb=0:malloc_context_size=0:detect_stack_use_after_return=0:allocator_release_to_os_interval_ms=10 \
        test "${memory[@]}" -- --test-threads 1 "${unfit[@]/#/--skip=}"
fi
