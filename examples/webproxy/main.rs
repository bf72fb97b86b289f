//! `webproxy`: answers GETFILE requests from a cache's segments, from an HTTP origin, or from both.

mod client;
mod listener;
mod origin;
mod proxy;
mod waiting;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser, error::ErrorKind, value_parser};
use listener::Listener;
use origin::{BaseUrl, Origin};
use proxy::{Proxy, Tally};
use shmferry::channel::InProcess;
use shmferry::loan::LoanStore;
use shmferry::protocol::Spool;
use shmferry::workers::WorkerPool;
use shmferry::{Address, Client, Server, Serving};
use shmferry_examples::getfile::Dialect;
use shmferry_examples::program::{self, Quit, Stop};
use shmferry_examples::serve::Service;
use shmferry_examples::store::Store;
use tracing::info;
use waiting::Waiting;

/// Serve files over GETFILE.
///
/// They come from simplecached (--cache), from a directory (--root), or from an HTTP server
/// (--server); with the latter and one of the former, from the cache first. Without any of the
/// three: from simplecached at its default address.
#[derive(Parser)]
#[command(name = "webproxy", version)]
struct Options {
    /// The TCP port to listen on; 0 for any
    #[arg(short = 'p', long, value_name = "PORT", default_value_t = 25362)]
    listen_port: u16,
    /// The IP address to listen on: this machine only, unless told otherwise; 0.0.0.0 for all of
    /// IPv4, :: for all of IPv6 and IPv4
    #[arg(long, value_name = "ADDR", default_value_t = Ipv4Addr::LOCALHOST.into())]
    listen: IpAddr,
    /// Workers: transfers at work at once
    #[arg(short, long, value_name = "COUNT", default_value_t = 8,
        value_parser = value_parser!(u16).range(1..=1024))]
    thread_count: u16,
    /// Segments in the pool: transfers from the cache at once, with those that wait for a client
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 8,
        value_parser = value_parser!(u32).range(1..))]
    segment_count: u32,
    /// Bytes of payload a segment holds, all slots together: plain, or as 512k, 64M, 1G
    #[arg(short = 'z', long, value_name = "BYTES", default_value_t = 512 << 10,
        value_parser = segment_size)]
    segment_size: u64,
    /// Slots a segment is cut into
    #[arg(long, value_name = "COUNT", default_value_t = 4,
        value_parser = value_parser!(u32).range(1..))]
    slots: u32,
    /// Where simplecached is: unix:PATH or mq:/NAME
    #[arg(long, value_name = "ADDRESS", conflicts_with = "root")]
    cache: Option<Address>,
    /// The base URL of an HTTP server; http://USER:PASSWORD@HOST for basic authentication
    #[arg(short, long, value_name = "URL")]
    server: Option<String>,
    /// A directory to serve, with the cache embedded
    #[arg(long, value_name = "DIRECTORY")]
    root: Option<PathBuf>,
    /// With --root, keep copies of files that are asked for again, so many bytes in all: as 64M,
    /// 1G; 0 for none [default: 256M, at most an eighth of the memory available]
    #[arg(long, value_name = "BYTES", value_parser = program::bytes, requires = "root")]
    loan_budget: Option<u64>,
    /// Keep what simplecached lends mapped, up to so many bytes; 0 takes no loans
    #[arg(long, value_name = "BYTES", default_value = "512M", value_parser = program::bytes,
        conflicts_with = "root")]
    mapped: u64,
    /// How to write replies
    #[arg(long, value_name = "spec|classic", default_value_t = Dialect::Spec)]
    dialect: Dialect,
    /// Give a transfer up after this long without progress: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
    /// The longest body of unknown length that is kept on disk until its length is known, and all
    /// of slow clients' bodies that is set aside while others wait for a segment: as 512k, 64M, 1G
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = program::bytes)]
    spool_limit: u64,
}

/// How long to wait, without an origin to ask instead, for the successor of a cache that is gone.
/// One that was never there is waited for as long as for everything else.
const ABSENCE: Duration = Duration::from_secs(2);

/// How many of those ahead in line may stall, each for a whole time-out, before a request for a
/// segment gives up, when there is no origin to ask instead.
const TURNS: u32 = 4;

fn segment_size(text: &str) -> Result<u64, String> {
    match program::bytes(text)? {
        ..824 => Err("a segment must hold at least 824 bytes".to_owned()),
        bytes => Ok(bytes),
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match options.server.as_deref().map(str::parse::<BaseUrl>).transpose() {
        Ok(url) => program::run("webproxy", |stop| serve(options, url, stop)),
        // Clap's own error would show the credentials.
        Err(why) => {
            let shown = options.server.unwrap_or_default();
            let shown = shown.rsplit_once('@').map_or(shown.clone(), |(_, at)| format!("***@{at}"));
            let message = format!("invalid value '{shown}' for '--server <URL>': {why}");
            Options::command().error(ErrorKind::ValueValidation, message).exit()
        }
    }
}

fn serve(options: Options, url: Option<BaseUrl>, stop: Stop) -> Result<(), Quit> {
    let (cache, embedded, from) = open_cache(&options, &stop)?;
    stop.hold();
    stop.check()?;
    let workers = options.thread_count.into();
    let asked = SocketAddr::new(options.listen, options.listen_port);
    let listener = Listener::bind(asked);
    let listener = Arc::new(listener.map_err(|why| format!("cannot listen on {asked}: {why}"))?);
    let proxy = Arc::new(Proxy {
        cache,
        origin: url.as_ref().map(|url| Origin::new(url, options.timeout, workers)),
        dialect: options.dialect,
        timeout: options.timeout,
        spool_limit: options.spool_limit,
        aside: Spool::new(options.spool_limit),
        waiting: Waiting::new(),
        tally: Tally::default(),
    });
    let pool = {
        let (listener, proxy) = (Arc::clone(&listener), Arc::clone(&proxy));
        let next = move || listener.accept();
        WorkerPool::start("proxy", workers, next, move |stream| proxy.serve(stream))
    };
    let pool = pool.map_err(|error| format!("cannot start a worker: {error}"))?;
    info!(
        "listening on {}: {}{from}, {}, {workers} workers, dialect {}, timeout {:?}, spool limit \
         {} bytes",
        listener.address,
        if options.listen.is_loopback() { LOOPBACK_ONLY } else { "" },
        url.map_or("no origin".to_owned(), |url| format!("origin {url}")),
        options.dialect,
        options.timeout,
        options.spool_limit,
    );

    stop.wait();
    listener.close();
    if stop.wind_down(|deadline| pool.join(deadline))
        && let Some(serving) = &embedded
    {
        serving.stop();
        stop.wind_down(|deadline| serving.wait_until(deadline));
    }
    info!("stopped: {}", proxy.summary());
    Ok(())
}

/// Says who is heard by default, and how to change that.
const LOOPBACK_ONLY: &str = "this machine only (--listen 0.0.0.0 or --listen :: for others, too), ";

/// The cache to ask first, if there is one; what serves it, if that is within this process; and
/// what to say of it.
fn open_cache(
    options: &Options,
    stop: &Stop,
) -> Result<(Option<Client>, Option<Serving>, String), String> {
    let has_stand_in = options.server.is_some();
    if options.root.is_none() && options.cache.is_none() && has_stand_in {
        return Ok((None, None, "no cache".to_owned()));
    }
    let client = Client::builder()
        .segments(options.segment_count)
        .segment_len(options.segment_size)
        .slots(options.slots)
        .keep_loans(options.mapped, options.mapped.min(256) as u32) // each costs a descriptor
        .timeout(options.timeout);
    let client = if has_stand_in {
        client.connect_timeout(Duration::ZERO)
    } else {
        let turns = options.timeout.saturating_mul(TURNS);
        client.lease_timeout(turns).connect_timeout_after_loss(ABSENCE)
    };
    let no_pool = |error| format!("cannot make the pool: {error}");
    let (client, embedded, from) = if let Some(root) = &options.root {
        let loans = options.loan_budget.map_or_else(LoanStore::default, LoanStore::new);
        let service = Service::new(Store::directory(root)?, loans, Duration::ZERO);
        let queue = InProcess::bounded(options.segment_count as usize); // a request takes a segment
        let client = client.in_process(&queue).map_err(no_pool)?;
        let server = Server::with(queue).timeout(options.timeout);
        let serving = service.start(server, options.thread_count.into())?;
        (client, Some(serving), format!("all beneath {}", root.display()))
    } else {
        let address = program::cache_address(options.cache.as_ref())?;
        if let Address::Mq(_) = address {
            stop.hold(); // its segments have names
        }
        (client.connect(&address).map_err(no_pool)?, None, format!("cache {address}"))
    };
    let Options { segment_count, segment_size, slots, .. } = options;
    let from = format!("{from}, {segment_count} segments of {segment_size} bytes in {slots} slots");
    Ok((Some(client), embedded, from))
}
