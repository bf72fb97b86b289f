#!/usr/bin/env bash
# Changes the library's code in one place at a time, and asks the tests whether they notice. What they
# do not notice is either a test that is missing or a change that changes nothing: docs/verification.md.
#
#   ci/mutants.sh                              all, some hours
#   ci/mutants.sh -f src/protocol/sender.rs    one file
#   ci/mutants.sh --list                       what would be changed
#
# First the quick suites look at every change; then those with processes at what was missed.
set -euo pipefail
cd "$(dirname "$0")/.."
# Small and quick to build: a change costs a second or two to compile, and as much to test.
export CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_TEST_DEBUG=0 CARGO_PROFILE_DEV_OPT_LEVEL=0
export PROPTEST_CASES=${PROPTEST_CASES:-20}
if command -v ld.lld >/dev/null; then export RUSTFLAGS="-Clink-arg=-fuse-ld=lld"; fi
# What a spoilt test leaves in the queue list goes with the namespace that it ran in.
if unshare -i true 2>/dev/null; then export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="unshare -i"; fi
command -v cargo-mutants >/dev/null || cargo install --locked --quiet cargo-mutants
output=${MUTANTS_OUTPUT:-$PWD/target/mutants}
mkdir -p "$output"

files=(-f 'src/sync/*.rs' -f 'src/segment/**/*.rs' -f src/protocol.rs -f 'src/protocol/*.rs' -f 'src/channel/**/*.rs')
case " $* " in *" -f "* | *" --file "*) files=() ;; esac
# Left out: what is not built here (the other parker, loom's stand-ins), and tests.
mutants() {
    cargo mutants --output "$output" "${files[@]}" \
        -e src/sync/raw_sync.rs -e src/sync/warden.rs -e src/segment/mapping_model.rs \
        -e "src/**/model.rs" -e src/protocol/tests.rs \
        --jobs 6 --no-shuffle --colors never "$@"
}

quick=(--cargo-arg=--lib --cargo-arg=--test=conformance --cargo-arg=--test=transfer --cargo-arg=--test=properties --cargo-arg=--test=rings)
mutants --timeout 25 "${quick[@]}" "$@" || [ $? -lt 4 ]
case " $* " in *" --list "*) exit ;; esac
slow=(--cargo-arg=--test=processes --cargo-arg=--test=hostile)
mutants --iterate --timeout 150 "${quick[@]}" "${slow[@]}" "$@"
