//! `shmferry-http`: a web server that serves what `simplecached` has.

mod answer;
mod metrics;
mod page;
mod path;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use futures_util::TryFutureExt;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use shmferry::Address;
use shmferry::tokio::{Body, Client};
use shmferry_examples::program::{self, Quit, Stop};
use tokio::net::TcpListener;
use tracing::{debug, info};

use answer::Site;

/// Serve over HTTP what simplecached has.
#[derive(Parser)]
#[command(name = "shmferry-http", version)]
struct Options {
    /// The address and port to listen on: this machine only, unless told otherwise; 0.0.0.0:8080
    /// for all of IPv4, `[::]:8080` for all of IPv6 and IPv4
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    listen: std::net::SocketAddr,
    /// Where simplecached is: unix:PATH [default: a socket in the runtime directory]
    #[arg(long, value_name = "ADDRESS")]
    cache: Option<Address>,
    /// Segments in the pool: bodies from the cache at once that are not lent
    #[arg(long, value_name = "COUNT", default_value_t = 32)]
    segments: u32,
    /// Bytes of payload a segment holds: plain, or as 512k, 64M, 1G
    #[arg(long, value_name = "BYTES", default_value = "512k", value_parser = program::bytes)]
    segment_size: u64,
    /// Give up after this long without progress of the cache, or of a client, and so long after a
    /// signal: 0.001 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = program::seconds)]
    timeout: Duration,
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
    stop.grace = options.timeout;
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| format!("cannot start: {error}"))?;
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
    let listener = runtime.block_on(TcpListener::bind(options.listen));
    let cannot = |error| format!("cannot listen on {}: {error}", options.listen);
    let listener = listener.map_err(cannot)?;
    let listening = listener.local_addr().unwrap_or(options.listen);
    let site = Arc::new(Site::new(cache, options.timeout));
    let connections = Arc::new(GracefulShutdown::new());
    let task = runtime.spawn(accept(listener, Arc::clone(&site), Arc::clone(&connections)));
    info!("listening on {listening}: cache {address}, {} segments", options.segments);

    stop.wait();
    task.abort();
    let _ = runtime.block_on(task); // it was aborted
    let connections = Arc::into_inner(connections).expect("nothing accepts any more");
    let ended = runtime.spawn(connections.shutdown());
    stop.wind_down(|deadline| {
        std::thread::sleep(deadline.remaining().unwrap_or_default()); // a moment
        ended.is_finished()
    });
    runtime.shutdown_background();
    info!("stopped: {}", site.metrics.summary());
    Ok(())
}

/// Serves connections. When it is aborted, no more are accepted.
async fn accept(listener: TcpListener, site: Arc<Site>, connections: Arc<GracefulShutdown>) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(site.timeout);
    http.half_close(true); // who has sent its request may shut that side down
    loop {
        let accepted = listener.accept().await;
        let accepted = accepted.inspect_err(|why| site.pace.warn(format_args!("accept: {why}")));
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let _ = stream.set_nodelay(true); // it is faster with, and works without
        let mut stream = tokio_io_timeout::TimeoutStream::new(stream);
        stream.set_write_timeout(Some(site.timeout));
        let site = Arc::clone(&site);
        let service = hyper::service::service_fn(move |request| {
            let site = Arc::clone(&site);
            async move { Ok::<_, std::convert::Infallible>(site.answer(&request).await) }
        });
        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = connections.watch(connection);
        tokio::spawn(connection.inspect_err(|error| debug!("a connection broke off: {error}")));
    }
}
