//! Asking the HTTP origin, and making a body's length known where it does not say.

use std::fmt;
use std::io::{self, Cursor, Read, Seek, Write};
use std::str::FromStr;
use std::time::Duration;

use shmferry::lend;
use tracing::warn;
use ureq::Agent;
use ureq::http::Uri;

use super::client::{Body, Found};
use super::proxy::Miss;

/// The longest that connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The longest body of unknown length that is kept in memory.
const IN_MEMORY: u64 = 64 << 10;

/// An origin's URL, without a slash at its end: paths are appended.
#[derive(Clone, Debug)]
pub struct BaseUrl(String);

impl FromStr for BaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let url: Uri = text.parse().map_err(|_| "not a URL")?;
        match (url.scheme_str(), url.host()) {
            (Some("http" | "https"), Some(host)) if !host.is_empty() => {}
            _ => return Err("expected http://HOST or https://HOST"),
        }
        if url.query().is_some() || text.contains('#') {
            return Err("paths cannot be appended to a query or a fragment");
        }
        Ok(BaseUrl(text.trim_end_matches('/').to_owned()))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An HTTP server to stream files from.
pub struct Origin {
    /// Uses connections again.
    agent: Agent,
    /// Uses each connection once.
    fresh: Agent,
    base: BaseUrl,
}

impl Origin {
    /// Asks beneath `base`, waiting up to `patience` for each step; keeps as many idle connections
    /// as there are workers. Redirects are followed, and the environment's HTTP proxy is used, as
    /// ureq does.
    pub fn new(base: &BaseUrl, patience: Duration, workers: u16) -> Origin {
        let keeping = |idle: u16| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .accept_encoding("identity")
                .timeout_connect(Some(patience.min(CONNECT)))
                .timeout_recv_response(Some(patience))
                .timeout_per_read(Some(patience))
                .timeout_per_write(Some(patience))
                .max_idle_connections(idle.into())
                .max_idle_connections_per_host(idle.into());
            Agent::new_with_config(config.build())
        };
        Origin { agent: keeping(workers), fresh: keeping(0), base: base.clone() }
    }

    /// Asks for a path.
    pub fn find(&self, path: &[u8]) -> Result<Found, Miss> {
        let fail = |error: &dyn fmt::Display| {
            warn!("the origin failed for {}: {error}", path.escape_ascii());
            Miss::Failed
        };
        let url = format!("{}{}", self.base, encode(path));
        let response = lend(|| match self.agent.get(&url).call() {
            // Perhaps it closed an idle connection just when we took that up again.
            Err(ureq::Error::Io(_)) => self.fresh.get(&url).call(),
            response => response,
        });
        let response = response.map_err(|error| fail(&error))?;
        match response.status().as_u16() {
            200 => {}
            404 | 410 => return Err(Miss::NotFound),
            status => return Err(fail(&format_args!("HTTP status {status}"))),
        }
        let body = response.into_body();
        let len = body.content_length();
        let body = Lending(body.into_reader());
        match len {
            Some(len) => Ok(Found { len, body: Body::Stream(Box::new(body)) }),
            None => spool(body).map_err(|error| fail(&error)),
        }
    }
}

/// Reads a body to its end, so that its length is known: in memory, or in an unnamed temporary
/// file where it is long.
pub fn spool(mut body: impl Read) -> io::Result<Found> {
    let mut start = Vec::new();
    let len = body.by_ref().take(IN_MEMORY + 1).read_to_end(&mut start)? as u64;
    if len <= IN_MEMORY {
        return Ok(Found { len, body: Body::Stream(Box::new(Cursor::new(start))) });
    }
    let mut file = tempfile::tempfile()?;
    file.write_all(&start)?;
    let len = len + io::copy(&mut body, &mut file)?;
    file.rewind()?;
    Ok(Found { len, body: Body::Stream(Box::new(file)) })
}

/// Escapes what a URL's path cannot hold, and what would end it.
fn encode(path: &[u8]) -> String {
    let mut encoded = String::with_capacity(path.len());
    for (at, byte) in path.iter().enumerate() {
        let legal = match byte {
            b'%' => matches!(path[at + 1..], [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()),
            byte => byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(byte),
        };
        if legal {
            encoded.push(char::from(*byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Lends this worker's place while the origin is slow.
struct Lending<R>(R);

impl<R: Read> Read for Lending<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        lend(|| self.0.read(into))
    }
}
