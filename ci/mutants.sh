#!/usr/bin/env bash
# Changes the library's code in one place at a time, and asks the tests whether they notice. What they
# do not notice is either a test that is missing or a change that changes nothing: docs/verification.md.
#
#   ci/mutants.sh                              all, some hours
#   ci/mutants.sh -f src/protocol/sender.rs    one file
#   ci/mutants.sh --list                       what would be changed
#
# MUTANTS_JOBS says how many are tried at a time: 6, unless told otherwise.
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

# A copy, without the programs' packages and the benches: each of the jobs would build those, too.
copy=$output/copy
rm -rf "$copy" && mkdir "$copy" && cp -r Cargo.lock README.md src tests "$copy"
manifest() { # [DEPENDENCY-TO-LEAVE-OUT]
    sed -E "/^\\[\\[bench\\]\\]/,/^$/d; /^(default-members|members${1:+|$1}) = /d" Cargo.toml >"$copy/Cargo.toml"
}
manifest

files=(-f 'src/sync/*.rs' -f 'src/segment/**/*.rs' -f src/protocol.rs -f 'src/protocol/*.rs'
    -f 'src/channel/**/*.rs' -f src/peer.rs -f 'src/peer/*.rs' -f src/workers.rs)
case " $* " in *" -f "* | *" --file "*) files=() ;; esac
# Left out: what is not built here (the other parker, loom's stand-ins), tests, what only debuggers read, and `^` for
# `|`, which is the same wherever we join bits: they are apart.
mutants() {
    cargo mutants --dir "$copy" --output "$output" "${files[@]}" \
        -e src/sync/raw_sync.rs -e src/sync/task_model.rs -e src/segment/mapping_model.rs \
        -e "src/**/model.rs" -e "src/**/tests.rs" --exclude-re ' tests::' --exclude-re 'impl fmt::Debug' \
        --exclude-re 'replace \| with \^' \
        --jobs "${MUTANTS_JOBS:-6}" --no-shuffle --colors never "$@"
}

# In stages, each at what the one before has missed: most is noticed by the unit tests alone, which are the
# quickest to build and to run.
unit=(--cargo-arg=--lib)
quick=(--cargo-arg=--test=conformance --cargo-arg=--test=transfer --cargo-arg=--test=properties --cargo-arg=--test=rings)
slow=(--cargo-arg=--test=processes --cargo-arg=--test=hostile)
# The harness of the others would have the library built once more.
manifest shmferry-test-support
mutants --timeout 20 "${unit[@]}" "$@" || [ $? -lt 4 ]
manifest
case " $* " in *" --list "*) exit ;; esac
for suites in "25 ${quick[*]}" "150 ${slow[*]}"; do
    # Tests that never end have noticed, too: not to be tried again.
    cat "$output/mutants.out/timeout.txt" >>"$output/mutants.out/caught.txt"
    mutants --iterate --timeout $suites "$@" || [ $? -lt 4 ]
done
