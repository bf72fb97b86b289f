//! Asking the HTTP origin: what it is asked for, and what is believed of its answer.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode, percent_encode};
use shmferry::workers::blocking;
use tracing::warn;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::header::{AUTHORIZATION, CONTENT_ENCODING, TRANSFER_ENCODING};
use ureq::http::{HeaderMap, HeaderValue, Uri};

use super::client::{Body, Client, Found};
use super::proxy::Miss;

/// An origin's URL, without a slash at its end: paths are appended. Shown without its credentials.
#[derive(Clone)]
pub struct BaseUrl {
    /// Without user and password.
    url: String,
    shown: String,
    /// User and password, as a header that no log shows.
    authorization: Option<HeaderValue>,
}

impl FromStr for BaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "expected http://HOST or https://HOST";
        let (scheme, rest) = text.split_once("://").ok_or(FORM)?;
        let url: Uri = text.parse().map_err(|_| "not a URL")?;
        let (Some("http" | "https"), Some(authority)) = (url.scheme_str(), url.authority()) else {
            return Err(FORM);
        };
        if authority.host().is_empty() {
            return Err(FORM);
        }
        if url.query().is_some() || text.contains('#') {
            return Err("paths cannot be appended to a query or a fragment");
        }
        let authority = authority.as_str();
        let (credentials, place) = match authority.rsplit_once('@') {
            Some((credentials, place)) => (Some(credentials), place),
            None => (None, authority),
        };
        // A colon within brackets belongs to an IPv6 address.
        let port = place.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
        if port.is_some_and(|(_, port)| !matches!(port.parse::<u16>(), Ok(1..))) {
            return Err("expected a port from 1 to 65535 after the colon");
        }
        let path = rest[authority.len()..].trim_end_matches('/');
        let authorization = credentials.map(basic).transpose()?;
        let shown = if authorization.is_some() { "***@" } else { "" };
        let shown = format!("{scheme}://{shown}{place}{path}");
        Ok(BaseUrl { url: format!("{scheme}://{place}{path}"), shown, authorization })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// The header for `USER:PASSWORD` as it stands in a URL. Our HTTP client makes one, too, but leaves
/// escapes as they are.
fn basic(credentials: &str) -> Result<HeaderValue, &'static str> {
    let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
    if !credentials.as_bytes().split(|byte| *byte == b'%').skip(1).all(is_escaped) {
        return Err("a percent sign escapes nothing");
    }
    let pair = [decode(user.as_bytes()), decode(password.as_bytes())].join(&b':');
    let header = format!("Basic {}", BASE64_STANDARD.encode(pair));
    let mut header = HeaderValue::try_from(header).map_err(|_| "credentials fit no header")?;
    header.set_sensitive(true);
    Ok(header)
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
    /// Asks beneath `base`, waiting up to `timeout` for each step; keeps as many idle connections
    /// as there are workers. Redirects are followed, with credentials to the same host only, and
    /// the environment's HTTP proxy is used, as ureq does.
    pub fn new(base: &BaseUrl, timeout: Duration, workers: usize) -> Origin {
        let keeping = |idle: usize| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .accept_encoding("identity")
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(timeout.min(Duration::from_secs(10))))
                .timeout_recv_response(Some(timeout))
                .timeout_per_read(Some(timeout))
                .timeout_per_write(Some(timeout))
                .max_idle_connections(idle)
                .max_idle_connections_per_host(idle);
            Agent::new_with_config(config.build())
        };
        Origin { agent: keeping(workers), fresh: keeping(0), base: base.clone() }
    }

    /// Asks for a path. A body of unknown length is spooled. A path that leads out of the base URL
    /// is not asked for, and not there.
    pub fn find(&self, path: &[u8], client: &Client, spool_limit: u64) -> Result<Found, Miss> {
        if leads_elsewhere(path) {
            return Err(Miss::NotFound);
        }
        let fail = |error: &dyn fmt::Display| {
            warn!("the origin failed for {}: {error}", path.escape_ascii());
            Miss::Failed
        };
        let url = format!("{}{}", self.base.url, encode(path));
        let ask = |agent: &Agent| {
            let request = agent.get(&url);
            match &self.base.authorization {
                Some(authorization) => request.header(AUTHORIZATION, authorization).call(),
                None => request.call(),
            }
        };
        let response = blocking(|| match ask(&self.agent) {
            // Perhaps it closed an idle connection just when we took that up again.
            Err(ureq::Error::Io(_)) => ask(&self.fresh),
            response => response,
        });
        let response = response.map_err(|error| fail(&error))?;
        match response.status().as_u16() {
            200 => {}
            404 | 410 => return Err(Miss::NotFound),
            status => return Err(fail(&format_args!("HTTP status {status}"))),
        }
        if let Some(encoding) = foreign_encoding(response.headers()) {
            return Err(fail(&format_args!("it sent {encoding}, and not the file as it is")));
        }
        let body = response.into_body();
        match body.content_length() {
            Some(len) => Ok(Found { len, body: Body::Stream(Box::new(body.into_reader())) }),
            None => client.spool(body.into_reader(), spool_limit, fail),
        }
    }
}

/// The header by which an origin says that its body is not the file itself, if there is one.
fn foreign_encoding(headers: &HeaderMap) -> Option<String> {
    // The client undoes chunks, and nothing else.
    let harmless = [(CONTENT_ENCODING, "identity"), (TRANSFER_ENCODING, "chunked")];
    harmless.into_iter().find_map(|(name, harmless)| {
        let is_foreign =
            |coding: &[u8]| !coding.is_empty() && !coding.eq_ignore_ascii_case(harmless.as_bytes());
        let mut values = headers.get_all(&name).into_iter().map(HeaderValue::as_bytes);
        let foreign = values.find(|value| {
            value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).any(is_foreign)
        })?;
        Some(format!("{name}: {}", foreign.escape_ascii()))
    })
}

/// Whether a path has a segment `.` or `..` for a server that decodes its escapes: that could lead
/// out of the base URL. Some servers take what follows a semicolon off a segment first.
fn leads_elsewhere(path: &[u8]) -> bool {
    decode(path).split(|byte| *byte == b'/').any(|segment| {
        let name = segment.split(|byte| *byte == b';').next();
        matches!(name, Some(b"." | b".."))
    })
}

/// Undoes escapes, once. What is no escape stays as it is.
fn decode(text: &[u8]) -> Vec<u8> {
    percent_decode(text).collect()
}

/// Whether what follows a percent sign makes it an escape.
fn is_escaped(after: &[u8]) -> bool {
    matches!(after, [high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit())
}

/// Escapes what a URL's path cannot hold, and what would end it. Escapes stay as they are.
fn encode(path: &[u8]) -> String {
    let mut parts = path.split(|byte| *byte == b'%');
    let mut encoded = percent_encode(parts.next().unwrap_or_default(), &ESCAPED).to_string();
    for part in parts {
        encoded += if is_escaped(part) { "%" } else { "%25" };
        encoded.extend(percent_encode(part, &ESCAPED));
    }
    encoded
}

/// All that does not stand for itself in a URL's path.
const ESCAPED: AsciiSet = {
    let legal = b"/-._~!$&'()*+,;=:@";
    let (mut escaped, mut at) = (NON_ALPHANUMERIC.remove(b'/'), 0);
    while at < legal.len() {
        escaped = escaped.remove(legal[at]);
        at += 1;
    }
    escaped
};
