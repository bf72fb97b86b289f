//! `simplecached`: serves a manifest's files, or a directory, through the segments of its clients.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, value_parser};
use shmferry::Peer;
use shmferry::channel::{PosixMq, RequestQueue, Seqpacket};
use shmferry_examples::address::Address;
use shmferry_examples::program::{self, Quit, Stop};
use shmferry_examples::serve::Service;
use shmferry_examples::store::Store;
use tracing::{info, warn};

/// Serve files to webproxy through shared memory.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// A manifest, with KEY PATH on each line and # before comments, or a directory to serve
    /// [default: locals.txt]
    #[arg(short, long, value_name = "PATH")]
    cachedir: Option<PathBuf>,
    /// Workers: transfers at work at once
    #[arg(short = 't', long, value_name = "COUNT", default_value_t = 8,
        value_parser = value_parser!(u16).range(1..=1024))]
    nthreads: u16,
    /// Wait this long before each look-up, for experiments
    #[arg(short, long, value_name = "MICROSECONDS", default_value_t = 0,
        value_parser = value_parser!(u64).range(0..=2_500_000))]
    delay: u64,
    /// Where to take requests: unix:PATH or mq:/NAME [default: a socket in the runtime directory]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
    /// The most segments that one client may bring
    #[arg(long, value_name = "COUNT", default_value_t = 1024,
        value_parser = value_parser!(u32).range(1..=65_536))]
    max_segments: u32,
    /// Give a transfer up after this long without progress: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
}

/// The manifest where none is named.
const DEFAULT_MANIFEST: &str = "locals.txt";

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("simplecached", |stop| serve(&options, stop))
}

fn serve(options: &Options, mut stop: Stop) -> Result<(), Quit> {
    let cachedir = options.cachedir.clone().unwrap_or_else(|| DEFAULT_MANIFEST.into());
    // A manifest may be a pipe that does not end.
    let store = stop.abandonable({
        let cachedir = cachedir.clone();
        move || Store::open(&cachedir)
    });
    let store = store.map_err(|quit| match quit {
        Quit::Failed(why) if options.cachedir.is_none() && !cachedir.exists() => {
            Quit::Failed(format!("{why}; name a manifest or a directory with -c"))
        }
        quit => quit,
    })?;
    let served = match &store {
        Store::Manifest(files) => format!("{} files of {}", files.len(), cachedir.display()),
        Store::Directory(_) => format!("all beneath {}", cachedir.display()),
    };
    let address = options.listen.clone().map_or_else(Address::default_of_user, Ok);
    let address = address.map_err(|error| format!("there is no default address: {error}"))?;
    let queue =
        bind(&address, options).map_err(|error| format!("cannot listen on {address}: {error}"))?;
    stop.check()?;
    let service =
        Arc::new(Service::new(store, Duration::from_micros(options.delay), options.timeout));
    let workers = service
        .start(&queue, options.nthreads.into())
        .map_err(|error| format!("cannot start a worker: {error}"))?;
    info!(
        "listening on {address}: {served}, {} workers, delay {} us, at most {} segments a client, \
         timeout {:?}",
        options.nthreads, options.delay, options.max_segments, options.timeout,
    );

    stop.wait();
    queue.close();
    stop.wind_down(&workers);
    drop(queue); // removes its names
    info!("stopped: {}", service.summary());
    Ok(())
}

fn bind(address: &Address, options: &Options) -> shmferry::Result<Arc<dyn RequestQueue>> {
    Ok(match address {
        Address::Unix(path) => Arc::new(
            Seqpacket::new(path).max_segments(options.max_segments).on_rejected(report).bind()?,
        ),
        Address::Mq(name) => Arc::new(
            PosixMq::new(name)?.max_segments(options.max_segments).on_rejected(report).bind()?,
        ),
    })
}

fn report(peer: Option<Peer>, why: &shmferry::Error) {
    match peer {
        Some(peer) => warn!("turned {peer} away: {why}"),
        None => warn!("turned a client away: {why}"),
    }
}
