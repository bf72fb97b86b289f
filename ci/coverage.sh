#!/usr/bin/env bash
# Which lines of the library the tests run, file by file. By the compiler's own instrumentation and
# LLVM's tools of the same major version (Debian: llvm-22). Processes that are killed write no profile.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/coverage CARGO_INCREMENTAL=0

major=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
LLVM_COV=${LLVM_COV:-/usr/bin/llvm-cov-$major} LLVM_PROFDATA=${LLVM_PROFDATA:-/usr/bin/llvm-profdata-$major}
if [ ! -x "$LLVM_COV" ]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "llvm-$major" >/dev/null
fi

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(--lib --test conformance --test transfer --test properties --test processes --test hostile)
out=$CARGO_TARGET_DIR/profiles
rm -rf "$out"; mkdir -p "$out"
export RUSTFLAGS="-Cinstrument-coverage" PROPTEST_CASES=${PROPTEST_CASES:-200}
LLVM_PROFILE_FILE="$CARGO_TARGET_DIR/build/%p-%m.profraw" cargo test --locked -p shmferry "${suites[@]}" --no-run
objects=()
while read -r binary; do objects+=(-object "$binary"); done < <(
    cargo test --locked -p shmferry "${suites[@]}" --no-run --message-format=json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
)
LLVM_PROFILE_FILE="$out/%p-%m.profraw" cargo test --locked -p shmferry "${suites[@]}" --no-fail-fast
find "$out" -name '*.profraw' -size +0 >"$out/list"
"$LLVM_PROFDATA" merge -sparse --failure-mode=all -f "$out/list" -o "$out/all.profdata"

"$LLVM_COV" export "${objects[@]}" -instr-profile "$out/all.profdata" -format=lcov \
    --ignore-filename-regex='/(registry|rustc|tests|examples|tools)/' >"$out/lcov" 2>/dev/null
echo
printf '%-40s %6s %6s %7s\n' file lines run ""
awk -v root="$PWD/" '
    /^SF:/ { file = substr($0, 4); sub(root, "", file) }
    /^LF:/ { found = substr($0, 4) }
    /^LH:/ { hit = substr($0, 4) }
    /^end_of_record/ { printf "%-40s %6d %6d %6.1f%%\n", file, found, hit, 100 * hit / found; f += found; h += hit }
    END { printf "%-40s %6d %6d %6.1f%%\n", "~all", f, h, 100 * h / f }' "$out/lcov" | sort
echo
echo "Lines that nothing ran: DA:LINE,0 in $out/lcov"
