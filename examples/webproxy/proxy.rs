//! From a client's request to its reply: the cache, the origin, and what is counted.

use std::fmt;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use shmferry::error::Awaited;
use shmferry::protocol::Spool;
use shmferry::{Error, Refusal, Size};
use shmferry_examples::getfile::{Dialect, Reply};
use tracing::{debug, warn};

use super::client::{Body, Client, Found};
use super::origin::Origin;
use super::waiting::Waiting;

/// Why there is nothing to send.
#[derive(Clone, Copy, Debug)]
pub enum Miss {
    /// It is not there.
    NotFound,
    /// Nobody could say whether it is there.
    Failed,
    /// The client left before it could be sent.
    ClientLeft,
}

/// Answers clients: from the cache first, then from the origin, where they are.
pub struct Proxy {
    pub cache: Option<shmferry::Client>,
    pub origin: Option<Origin>,
    pub dialect: Dialect,
    pub timeout: Duration,
    /// The longest body of unknown length, in bytes.
    pub spool_limit: u64,
    /// Where bodies of slow clients are set aside.
    pub aside: Spool,
    pub waiting: Waiting,
    pub tally: Tally,
}

/// How it went so far.
#[derive(Default)]
pub struct Tally {
    requests: AtomicU64,
    hits: AtomicU64,
    lent: AtomicU64, // of the hits
    misses: AtomicU64,
    from_origin: AtomicU64,
    invalid: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

impl Proxy {
    /// Serves one client, from its request to its end. A client that leaves is nobody's error.
    pub fn serve(&self, stream: TcpStream) {
        let client = Client::new(stream, self.dialect, self.timeout);
        let path = match client.request(&self.waiting) {
            Ok(path) => path,
            Err(error) => return debug!("a client left before it asked: {error}"),
        };
        self.tally.requests.fetch_add(1, Relaxed);
        let Some(path) = path else {
            self.tally.invalid.fetch_add(1, Relaxed);
            return refuse(client, Reply::Invalid);
        };
        match self.find(&path, &client) {
            Ok(found) => match client.send(found, &self.aside) {
                Ok(len) => {
                    self.tally.bytes.fetch_add(len, Relaxed);
                    client.close(false);
                }
                Err(error @ (Error::Sink(_) | Error::Timeout(Awaited::Sink))) => {
                    debug!("a client left {}: {error}", path.escape_ascii());
                }
                // The header is out: the connection ends short, with nothing made up.
                Err(error) => {
                    self.tally.errors.fetch_add(1, Relaxed);
                    warn!("{} broke off: {error}", path.escape_ascii());
                }
            },
            Err(Miss::NotFound) => refuse(client, Reply::FileNotFound),
            Err(Miss::Failed) => {
                self.tally.errors.fetch_add(1, Relaxed);
                refuse(client, Reply::Error);
            }
            Err(Miss::ClientLeft) => debug!("a client left {}", path.escape_ascii()),
        }
    }

    fn find(&self, path: &[u8], client: &Client) -> Result<Found, Miss> {
        let mut found = Err(Miss::NotFound);
        if let Some(cache) = &self.cache {
            found = self.ask(cache, path, client);
            let is_lent = |it: &Found| matches!(&it.body, Body::Cached(body) if body.is_lent());
            let is_miss = matches!(found, Err(Miss::NotFound));
            self.tally.hits.fetch_add(found.is_ok().into(), Relaxed);
            self.tally.lent.fetch_add(found.as_ref().is_ok_and(is_lent).into(), Relaxed);
            self.tally.misses.fetch_add(is_miss.into(), Relaxed);
        }
        if let (Some(origin), Err(Miss::NotFound | Miss::Failed)) = (&self.origin, &found) {
            found = origin.find(path, client, self.spool_limit);
            self.tally.from_origin.fetch_add(found.is_ok().into(), Relaxed);
        }
        found
    }

    /// Asks the cache. A stream is spooled.
    fn ask(&self, cache: &shmferry::Client, path: &[u8], client: &Client) -> Result<Found, Miss> {
        let fail = |error: &dyn fmt::Display, hint: &str| {
            let path = path.escape_ascii();
            if self.origin.is_some() {
                debug!("the cache failed for {path}: {error}"); // there is somebody else to ask
            } else {
                warn!("the cache failed for {path}: {error}{hint}");
            }
            Miss::Failed
        };
        match cache.get(path) {
            Ok(body) => match body.size() {
                Size::Known(len) => Ok(Found { len, body: Body::Cached(Box::new(body)) }),
                Size::Unknown => client.spool(body, self.spool_limit, |error| fail(error, "")),
            },
            Err(Error::Refused(Refusal::NotFound | Refusal::Invalid)) => Err(Miss::NotFound),
            Err(Error::Refused(_)) => Err(Miss::Failed),
            Err(error @ Error::Timeout(Awaited::Lease)) => Err(fail(&error, HINT)),
            Err(error) => Err(fail(&error, "")),
        }
    }

    /// How it went, in one line.
    pub fn summary(&self) -> String {
        let Tally { requests, hits, lent, misses, from_origin, invalid, errors, bytes } =
            &self.tally;
        let retired = self.cache.as_ref().map_or(0, |cache| cache.stats().retired);
        format!(
            "requests={requests:?} hits={hits:?} misses={misses:?} from_origin={from_origin:?} \
             invalid={invalid:?} errors={errors:?} lent={lent:?} streamed={} bytes={bytes:?} \
             retired={retired} set_aside={}",
            hits.load(Relaxed).saturating_sub(lent.load(Relaxed)),
            self.aside.bodies(),
        )
    }
}

/// What the user can do when there is no segment to be had.
const HINT: &str = ": slow clients hold all of them, and their bodies do not fit into \
                    --spool-limit, or its disk (more segments: -n)";

fn refuse(client: Client, reply: Reply) {
    match client.reply(reply) {
        // A malformed request may still be on its way.
        Ok(()) => client.close(reply == Reply::Invalid),
        Err(error) => debug!("a client left without its reply: {error}"),
    }
}
