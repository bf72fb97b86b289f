//! `shmferry-http`: a web server that serves what `simplecached` has.

mod answer;
mod metrics;
mod page;
mod path;
mod standin;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use shmferry::Address;
use shmferry_examples::program::{self, Pace, Quit, Stop};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_io_timeout::TimeoutStream;
use tracing::{debug, info};

use answer::Site;
use metrics::Metrics;
use standin::ConnectTokio as _;

/// Serve over HTTP what simplecached has.
#[derive(Parser)]
#[command(name = "shmferry-http", version)]
struct Options {
    /// The address and port to listen on: this machine only, unless told otherwise; 0.0.0.0:8080
    /// for all of IPv4, [::]:8080 for all of IPv6 and IPv4
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where simplecached is: unix:PATH [default: a socket in the runtime directory]
    #[arg(long, value_name = "ADDRESS")]
    cache: Option<Address>,
    /// Segments in the pool: bodies from the cache at once that are not lent
    #[arg(long, value_name = "COUNT", default_value_t = 32)]
    segments: u32,
    /// Bytes of payload a segment holds: plain, or as 512k, 64M, 1G
    #[arg(long, value_name = "BYTES", default_value = "512k", value_parser = program::bytes)]
    segment_size: u64,
    /// Give up after this long without progress of the cache, or of a client: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
    /// At the end, let answers under way go on for this long: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    grace: Duration,
}

/// How long to wait for a cache that is not there.
const ABSENCE: Duration = Duration::from_secs(2);

/// How long to leave the system alone that does not accept connections: it lacks descriptors, say.
const PAUSE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("shmferry-http", |stop| serve(&options, stop))
}

fn serve(options: &Options, mut stop: Stop) -> Result<(), Quit> {
    stop.grace = options.grace;
    let runtime = Runtime::new().map_err(|error| format!("cannot start: {error}"))?;
    let _within = runtime.enter();
    let address = program::cache_address(options.cache.as_ref())?;
    stop.hold();
    let cache = shmferry::Client::builder()
        .segments(options.segments)
        .segment_len(options.segment_size)
        .slots(4)
        .timeout(options.timeout)
        .connect_timeout(ABSENCE)
        .connect_tokio(&address)
        .map_err(|error| format!("cannot make the pool: {error}"))?;
    let asked = options.listen;
    let listener = runtime.block_on(TcpListener::bind(asked));
    let listener = listener.map_err(|error| format!("cannot listen on {asked}: {error}"))?;
    let listening = listener.local_addr().map_err(|error| error.to_string())?;
    let site = Arc::new(Site { cache, metrics: Metrics::new(), pace: Pace::default() });
    let connections = Arc::new(GracefulShutdown::new());
    let accepting = accept(listener, Arc::clone(&site), options.timeout, Arc::clone(&connections));
    let accepting = runtime.spawn(accepting);
    info!(
        "listening on {listening}: cache {address}, {} segments of {} bytes, timeout {:?}",
        options.segments, options.segment_size, options.timeout,
    );

    stop.wait();
    accepting.abort();
    let _ = runtime.block_on(accepting); // it was aborted
    let connections = Arc::into_inner(connections).expect("nothing accepts any more");
    let ended = runtime.spawn(connections.shutdown());
    stop.wind_down(|deadline| {
        thread::sleep(deadline.remaining().unwrap_or_default()); // a moment
        ended.is_finished()
    });
    runtime.shutdown_background();
    info!("stopped: {}", site.metrics.summary());
    Ok(())
}

/// Serves connections. When it is aborted, no more are accepted.
async fn accept(
    listener: TcpListener,
    site: Arc<Site>,
    timeout: Duration,
    connections: Arc<GracefulShutdown>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(timeout);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                site.pace.warn(format_args!("cannot accept a connection: {error}"));
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true); // it is faster with, and works without
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(timeout));
        let site = Arc::clone(&site);
        let service = service_fn(move |request| {
            let site = Arc::clone(&site);
            async move { Ok::<_, Infallible>(site.answer(&request).await) }
        });
        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!("a connection broke off: {error}");
            }
        });
    }
}
