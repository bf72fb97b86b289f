//! Writes what a server has by a key to standard output: `fetch unix:PATH KEY`.

use shmferry::{Client, Result};
use std::{env, io};

fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let (Some(address), Some(key)) = (args.next(), args.next()) else {
        panic!("usage: fetch unix:PATH KEY");
    };
    let server = Client::connect(address)?;
    let mut body = server.get(key)?;
    body.copy_to(io::stdout())?;
    Ok(())
}
