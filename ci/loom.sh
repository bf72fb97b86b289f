#!/usr/bin/env bash
# The semaphore under loom: every interleaving and reordering, with up to LOOM_MAX_PREEMPTIONS (2)
# preemptions; then that the check can fail: each weakening of one line must be found.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=${LOOM_MAX_PREEMPTIONS:-2}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/loom
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

loom() { cargo test --locked --release --lib sync::semaphore::model; }

loom
cp -r Cargo.toml Cargo.lock README.md src "$copy"

# seeded NAME SED-SCRIPT: the semaphore with this fault must fail. A deadlock is a failure, too.
seeded() {
    sed "$2" src/sync/semaphore.rs >"$copy/src/sync/semaphore.rs"
    cmp -s src/sync/semaphore.rs "$copy/src/sync/semaphore.rs" && { echo "the fault '$1' changes nothing"; exit 1; }
    if (cd "$copy" && cargo test --locked --release --lib --no-run >"$copy/log" 2>&1); then
        (cd "$copy" && loom >"$copy/log" 2>&1) && { echo "not found: $1"; exit 1; }
        grep -q 'test result: FAILED\|panicked\|SIGABRT' "$copy/log" || { cat "$copy/log"; exit 1; }
        echo "found: $1"
    else
        cat "$copy/log"; echo "does not compile: $1"; exit 1
    fi
}
seeded "a permit added without Release"        's/self.word.fetch_add(1, Release)/self.word.fetch_add(1, Relaxed)/'
seeded "a permit taken without Acquire"        's/let mut seen = self.word.load(Acquire)/let mut seen = self.word.load(Relaxed)/; s/(seen, seen - 1, Acquire, Acquire)/(seen, seen - 1, Relaxed, Relaxed)/'
seeded "poison set without Release"            's/self.word.fetch_or(POISON, Release)/self.word.fetch_or(POISON, Relaxed)/'
seeded "poison seen without Acquire"           's/let mut seen = self.word.load(Acquire)/let mut seen = self.word.load(Relaxed)/'
seeded "no fence before the sleep"             '/let slept/,/let slept/!s/^            fence(SeqCst); \/\/ pair 2$//'
seeded "no fence before the wake"              's/^        fence(SeqCst); \/\/ pair 2$//'
seeded "a sleeper that does not say so"        's/self.sleepers.fetch_add(1, Relaxed);//; s/self.sleepers.fetch_sub(1, Relaxed);//'
seeded "a post that does not wake"             '/pub(crate) fn post/,/^    }/s/self.wake();//'
seeded "nothing that wakes"                    's/self.parker.unpark_all(&self.word);$//'
