//! `simplecached`: serves a manifest's files, or a directory, to clients through shared memory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, value_parser};
use shmferry::loan::LoanStore;
use shmferry::{Address, Server};
use shmferry_examples::program::{self, Quit, Stop};
use shmferry_examples::serve::Service;
use shmferry_examples::store::Store;
use tracing::info;

/// Serve files to webproxy through shared memory.
#[derive(Parser)]
#[command(name = "simplecached", version)]
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
    /// Keep copies of files that are asked for again, so many bytes in all, and lend them: plain,
    /// or as 512k, 64M, 1G; 0 for none [default: 256M, at most an eighth of the memory available]
    #[arg(long, value_name = "BYTES", value_parser = program::bytes)]
    loan_budget: Option<u64>,
    /// Lend read-only descriptors of the files that are not among those copies
    #[arg(long)]
    loan_files: bool,
    /// Give a transfer up after this long without progress: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("simplecached", |stop| serve(options, stop))
}

fn serve(options: Options, stop: Stop) -> Result<(), Quit> {
    let cachedir = options.cachedir.as_deref().unwrap_or("locals.txt".as_ref());
    let store = Store::open(cachedir).map_err(|why| match options.cachedir {
        None if !cachedir.exists() => format!("{why}; name a manifest or a directory with -c"),
        _ => why,
    })?;
    let served = match &store {
        Store::Manifest(files) => format!("{} files of {}", files.len(), cachedir.display()),
        Store::Directory(_) => format!("all beneath {}", cachedir.display()),
    };
    let address = program::cache_address(options.listen.as_ref())?;
    stop.hold(); // from here on there are names to remove
    let server = Server::builder().max_segments(options.max_segments).bind(&address);
    let server = server.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    stop.check()?;
    let loans = options.loan_budget.map_or_else(LoanStore::default, LoanStore::new);
    let loans = loans.lend_files(options.loan_files);
    let service = Service::new(store, loans, Duration::from_micros(options.delay));
    let serving = service.start(server.timeout(options.timeout), options.nthreads.into())?;
    info!(
        "listening on {address}: {served}, {} workers, delay {} us, at most {} segments a client, \
         timeout {:?}",
        options.nthreads, options.delay, options.max_segments, options.timeout,
    );

    stop.wait();
    serving.stop();
    stop.wind_down(|deadline| serving.wait_until(deadline));
    drop(serving); // removes its names
    info!("stopped: {}", service.summary());
    Ok(())
}
