//! The transfer bench once more, with other crates beside its own methods: see `others.rs`.
//!
//! `cargo bench --manifest-path benches/peers/Cargo.toml`; it runs in this directory, as cargo has it, so that
//! the results are written to the crate's documents by `-- --write ../../docs`.

#[path = "../transfer/main.rs"]
#[expect(dead_code, reason = "its own `main`, which runs fewer methods")]
mod transfer;

mod others;

use std::io;

fn main() -> io::Result<()> {
    let methods = [transfer::peers::methods(), others::methods(), transfer::ours::methods()];
    let command = "cargo bench --manifest-path benches/peers/Cargo.toml -- --write ../../docs";
    transfer::run(command, methods.into_iter().flatten().collect())
}
