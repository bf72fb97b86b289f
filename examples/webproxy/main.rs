//! `webproxy`: answers GETFILE requests from a cache's segments, from an HTTP origin, or from both.

#[path = "../common/address.rs"]
mod address;
mod cache;
mod client;
#[path = "../common/getfile.rs"]
#[allow(dead_code, reason = "clients and tests need other parts of it")]
mod getfile;
mod listener;
mod origin;
#[path = "../common/program.rs"]
mod program;
mod proxy;
#[path = "../common/serve.rs"]
#[allow(dead_code, reason = "simplecached needs other parts of it")]
mod serve;
#[path = "../common/store.rs"]
#[allow(dead_code, reason = "simplecached needs other parts of it")]
mod store;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use address::Address;
use cache::Cache;
use clap::{Parser, value_parser};
use getfile::Dialect;
use listener::Listener;
use origin::{BaseUrl, Origin};
use program::Stop;
use proxy::Proxy;
use serve::Service;
use shmferry::{
    Backing, Crew, InProcess, Memfd, Named, PosixMq, RequestQueue, SegmentPool, Seqpacket, Spool,
};
use store::Store;
use tracing::info;

/// Serve files over GETFILE.
///
/// They come from simplecached (--cache), from a directory (--root), or from an HTTP server
/// (--server); with the latter and one of the former, from the cache first. Without any of the
/// three: from simplecached at its default address.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The TCP port to listen on; 0 for any
    #[arg(short = 'p', long, value_name = "PORT", default_value_t = 25362)]
    listen_port: u16,
    /// The IP address to listen on [default: all, of IPv6 and IPv4]
    #[arg(long, value_name = "ADDR")]
    listen: Option<IpAddr>,
    /// Workers: transfers at work at once
    #[arg(short, long, value_name = "COUNT", default_value_t = 8,
        value_parser = value_parser!(u16).range(1..=1024))]
    thread_count: u16,
    /// Segments in the pool: transfers from the cache at once, those that wait for a client included
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 8,
        value_parser = value_parser!(u32).range(1..))]
    segment_count: u32,
    /// Bytes of payload a segment holds, all slots together
    #[arg(short = 'z', long, value_name = "BYTES", default_value_t = 512 << 10, value_parser = segment_size)]
    segment_size: u64,
    /// Slots a segment is cut into
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = value_parser!(u32).range(1..))]
    slots: u32,
    /// Where simplecached is: unix:PATH or mq:/NAME
    #[arg(long, value_name = "ADDRESS", conflicts_with = "root")]
    cache: Option<Address>,
    /// The base URL of an HTTP server
    #[arg(short, long, value_name = "URL")]
    server: Option<BaseUrl>,
    /// A directory to serve, with the cache embedded
    #[arg(long, value_name = "DIRECTORY")]
    root: Option<PathBuf>,
    /// The most bytes on disk for bodies that are set aside: of slow clients, while others wait for a
    /// segment
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30)]
    spool_limit: u64,
    /// How to write replies
    #[arg(long, value_name = "spec|classic", default_value_t = Dialect::Spec)]
    dialect: Dialect,
    /// Give a transfer up after this long without progress
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
}

/// How long to wait for the successor of a cache that is gone, when there is no origin to ask instead:
/// long enough for one that is being restarted. One that was never there is waited for as long as for
/// everything else.
const ABSENCE: Duration = Duration::from_secs(2);

/// How long to wait for a cache that is not there, when there is an origin to ask instead.
const NO_ABSENCE: Duration = Duration::ZERO;

/// The least that a segment may hold.
const LEAST_SEGMENT: u64 = 824;

fn segment_size(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(bytes) if bytes >= LEAST_SEGMENT => Ok(bytes),
        Ok(_) => Err(format!("a segment must hold at least {LEAST_SEGMENT} bytes")),
        Err(error) => Err(format!("not a number of bytes: {error}")),
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("webproxy", |stop| serve(options, stop))
}

fn serve(options: Options, mut stop: Stop) -> Result<(), String> {
    let source = Source::open(&options)?;
    let origin = options.server.as_ref().map(|url| Origin::new(url, options.timeout, options.thread_count));
    let listener = Arc::new(Listener::bind(options.listen, options.listen_port)?);
    let spool = Spool::new(options.spool_limit);
    let proxy = Arc::new(Proxy::new(source.cache, origin, options.dialect, options.timeout, spool));
    let crew = {
        let (listener, proxy) = (Arc::clone(&listener), Arc::clone(&proxy));
        let next = move || listener.accept();
        Crew::start("proxy", options.thread_count.into(), next, move |stream| proxy.serve(stream))
            .map_err(cannot_start_a_worker)?
    };
    info!(
        "listening on {}: {}, {}, {} workers, dialect {}, timeout {:?}",
        listener.address(),
        source.description,
        options.server.map_or("no origin".to_owned(), |url| format!("origin {url}")),
        options.thread_count,
        options.dialect,
        options.timeout,
    );

    stop.wait();
    listener.close();
    if stop.wind_down(&crew)
        && let Some((queue, crew)) = &source.embedded
    {
        queue.close();
        stop.wind_down(crew);
    }
    info!("stopped: {}", proxy.summary());
    Ok(())
}

/// The cache to ask first, if there is one.
struct Source {
    cache: Option<Cache>,
    /// The queue and the workers of a cache within this process.
    embedded: Option<(Arc<InProcess>, Crew)>,
    description: String,
}

impl Source {
    fn open(options: &Options) -> Result<Source, String> {
        let has_origin = options.server.is_some();
        if options.root.is_none() && options.cache.is_none() && has_origin {
            return Ok(Source { cache: None, embedded: None, description: "no cache".to_owned() });
        }
        let segments = format!(
            "{} segments of {} bytes in {} slots",
            options.segment_count, options.segment_size, options.slots
        );

        if let Some(root) = &options.root {
            let service = Arc::new(Service::new(Store::directory(root)?, Duration::ZERO, options.timeout));
            // No request is sent without a segment: there is always room.
            let queue = Arc::new(InProcess::bounded(options.segment_count as usize));
            let crew = service.start(&queue, options.thread_count.into()).map_err(cannot_start_a_worker)?;
            let pool = pool_of::<Memfd>(options)?;
            let cache = Cache::new(pool, InProcess::clone(&queue), options.timeout, has_origin);
            let description = format!("all beneath {}, {segments}", root.display());
            return Ok(Source { cache: Some(cache), embedded: Some((queue, crew)), description });
        }

        let address = options.cache.clone().map_or_else(Address::default_of_user, Ok);
        let address = address.map_err(|error| format!("there is no default address: {error}"))?;
        let unusable = |error| format!("cannot use {address}: {error}");
        let cache = match &address {
            Address::Unix(path) => {
                let pool = pool_of::<Memfd>(options)?;
                let queue = Seqpacket::new(path);
                let queue =
                    if has_origin { queue.absence(NO_ABSENCE) } else { queue.absence_after_loss(ABSENCE) };
                let requester = queue.requester(&pool).map_err(unusable)?;
                Cache::new(pool, requester, options.timeout, has_origin)
            }
            Address::Mq(name) => {
                let pool = pool_of::<Named>(options)?;
                let queue = PosixMq::new(name).map_err(unusable)?;
                let queue =
                    if has_origin { queue.absence(NO_ABSENCE) } else { queue.absence_after_loss(ABSENCE) };
                let requester = queue.requester(&pool);
                Cache::new(pool, requester, options.timeout, has_origin)
            }
        };
        Ok(Source { cache: Some(cache), embedded: None, description: format!("cache {address}, {segments}") })
    }
}

fn pool_of<B: Backing>(options: &Options) -> Result<SegmentPool<B>, String> {
    SegmentPool::builder()
        .segments(options.segment_count)
        .segment_len(options.segment_size)
        .slots(options.slots)
        .create()
        .map_err(|error| format!("cannot make the pool: {error}"))
}

fn cannot_start_a_worker(error: std::io::Error) -> String {
    format!("cannot start a worker: {error}")
}
