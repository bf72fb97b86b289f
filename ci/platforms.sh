#!/bin/bash
# Type-checks the portable part for systems that cannot be run here, with a compiler that brings the
# source of its standard library along (Debian: rustc-web, cargo-web, rust-web-src). 100 s a target.
set -euo pipefail
cd "$(dirname "$0")/.."

# The compiler that Debian first had under this name is older than what Cargo.toml asks for; the list of
# packages may be, too.
is_there() {
    [ -e /usr/lib/rustlib/src/rust/library ] && command -v x86_64-w64-mingw32-dlltool >/dev/null &&
        printf '1.88\n%s\n' "$(/usr/bin/rustc --version | cut -d ' ' -f 2)" | sort --version-sort --check=quiet
}
if ! is_there; then
    { apt-get update -qq && apt-get install -y -qq rustc-web cargo-web rust-web-src binutils-mingw-w64-x86-64; } >/dev/null 2>&1 || true
    is_there || {
        echo "not checked: no compiler for other systems can be installed here"
        exit 0
    }
fi
for target in aarch64-apple-darwin x86_64-pc-windows-gnu; do
    echo "== $target"
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target/platforms \
        /usr/bin/cargo check -q --locked -p shmferry --lib -Zbuild-std=std,panic_abort --target "$target"
done
