//! Serves the files beneath a directory: `serve unix:PATH DIRECTORY`. Ask with `fetch`.

use shmferry::{Refusal, Server};
use std::{env, fs::File, path::Path, str::from_utf8};

fn main() -> shmferry::Result<()> {
    let mut args = env::args().skip(1);
    let (Some(address), Some(root)) = (args.next(), args.next()) else {
        panic!("usage: serve unix:PATH DIRECTORY");
    };
    let server = Server::bind(address)?.serve(8, move |request| {
        let name = from_utf8(request.key()).ok().filter(|name| !name.contains(".."));
        match name.map(|name| File::open(Path::new(&root).join(name.trim_start_matches('/')))) {
            Some(Ok(file)) if file.metadata()?.is_file() => request.send_file(&file),
            _ => request.refuse(Refusal::NotFound),
        }
    })?;
    server.wait();
    Ok(())
}
