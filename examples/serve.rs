//! Serves the files beneath a directory: `serve unix:PATH DIRECTORY`. Ask with `fetch`.

use shmferry::{Refusal, Server, files::Directory};
use std::env;

fn main() -> shmferry::Result<()> {
    let mut args = env::args().skip(1);
    let (Some(address), Some(root)) = (args.next(), args.next()) else {
        panic!("usage: serve unix:PATH DIRECTORY");
    };
    let files = Directory::open(root)?;
    let server =
        Server::bind(address)?.serve(8, move |request| match files.file(request.key())? {
            Some(file) => request.send_file(&file),
            None => request.refuse(Refusal::NotFound),
        })?;
    server.wait();
    Ok(())
}
