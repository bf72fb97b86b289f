//! From a request to its answer: what to ask the cache, and what to say of what comes.

use std::time::{Duration, Instant, UNIX_EPOCH};

use futures_util::TryStreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use http_range_header::{EndPosition, StartPosition, SyntacticallyCorrectRange};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{self, HeaderMap};
use hyper::http::response::Builder;
use hyper::{Method, Request, Response, StatusCode};
use shmferry::error::Awaited;
use shmferry::{Error, Metadata, Refusal};
use shmferry_examples::asked::{HEAD, LIST, NO_SUCH_PART, Stamp};
use shmferry_examples::program::Pace;
use tracing::debug;

use super::{Body, Client, metrics, page, path};

/// The longest list of names that makes a page, in bytes.
const LONGEST_LIST: u64 = 16 << 20;

const TEXT: &str = "text/plain; charset=utf-8";

pub type Answer = Response<UnsyncBoxBody<Bytes, Error>>;

/// Answers from the cache.
pub struct Site {
    pub cache: Client,
    pub metrics: metrics::Metrics,
    pub pace: Pace,
    /// Of connections.
    pub timeout: Duration,
}

impl Site {
    pub fn new(cache: Client, timeout: Duration) -> Site {
        Site { cache, metrics: metrics::Metrics::new(), pace: Pace::default(), timeout }
    }

    pub async fn answer(&self, request: &Request<Incoming>) -> Answer {
        let began = Instant::now();
        let answer = match request.uri().path() {
            _ if ![Method::GET, Method::HEAD].contains(request.method()) => {
                let head = head(StatusCode::METHOD_NOT_ALLOWED, TEXT);
                with_text(head.header(header::ALLOW, "GET, HEAD"), "only GET and HEAD\n")
            }
            "/metrics" => {
                let text = self.metrics.render(&self.cache.stats());
                with_text(head(StatusCode::OK, metrics::TYPE), text)
            }
            "/healthz" => match self.cache.get(key(b"/", HEAD)).await {
                // It answers, whatever that is.
                Ok(_) | Err(Error::Refused(Refusal::NotFound)) => status(StatusCode::OK),
                Err(_) => status(StatusCode::SERVICE_UNAVAILABLE),
            },
            path => {
                let is_head = request.method() == Method::HEAD;
                let found = self.find(path, request.headers(), is_head).await;
                found.inspect(|_| _ = self.metrics.hits.inc()).unwrap_or_else(|error| {
                    let code = status_of(&error);
                    if code.is_server_error() {
                        self.pace.warn(format_args!("{path}: {code}: {error}"));
                    }
                    status(code)
                })
            }
        };
        let status = [("status", answer.status().as_str().to_owned())];
        self.metrics.requests.get_or_create(&status).inc();
        self.metrics.seconds.observe(began.elapsed().as_secs_f64());
        answer
    }

    /// Answers with what the cache has.
    async fn find(&self, path: &str, headers: &HeaderMap, is_head: bool) -> Result<Answer, Error> {
        match path::decode(path).ok_or(Error::Refused(Refusal::Invalid))? {
            key if key.ends_with(b"/") => self.page(&key).await,
            key => self.file(&key, headers, is_head).await,
        }
    }

    async fn page(&self, directory: &[u8]) -> Result<Answer, Error> {
        let list = self.cache.get(key(directory, LIST)).await?;
        if list.size().known().is_none_or(|len| len > LONGEST_LIST) {
            return Ok(status(StatusCode::INTERNAL_SERVER_ERROR));
        }
        let page = page::render(directory, &list.read_all().await?);
        let head = head(StatusCode::OK, "text/html; charset=utf-8");
        Ok(with_text(head.header(header::CONTENT_SECURITY_POLICY, page::POLICY), page))
    }

    async fn file(&self, path: &[u8], headers: &HeaderMap, is_head: bool) -> Result<Answer, Error> {
        // What cannot be read is there all the same, and matches nothing.
        let of = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
        let (tags, since) = (of(header::IF_NONE_MATCH), of(header::IF_MODIFIED_SINCE));
        if is_head || tags.or(since).is_some() {
            let stamp = self.cache.get(key(path, HEAD)).await?.metadata()?;
            if is_fresh(tags, since, &stamp) {
                return Ok(with_text(describe(path, &stamp, None).status(304), ""));
            }
            if is_head {
                let len = Some(stamp.len).filter(|len| *len < u64::MAX);
                return Ok(with_text(describe(path, &stamp, len), ""));
            }
        }
        // Several ranges, and those that do not parse, are answered with all of the file.
        let is_one = |range: &&str| {
            http_range_header::parse_range_header(range)
                .is_ok_and(|it| matches!(&it.ranges[..], [one] if !is_backward(one)))
        };
        if let Some(range) = of(header::RANGE).filter(is_one) {
            // The file may be another than the one that the client has the rest of.
            let holds = |stamp: &Stamp| match (of(header::IF_RANGE), validators(stamp)) {
                (Some(asked), found) => found.is_some_and(|it| it.contains(&asked.to_owned())),
                (None, _) => true,
            };
            match self.cache.get(key(path, range)).await {
                Ok(body) => {
                    let stamp = body.metadata::<Stamp>()?;
                    if stamp.len == u64::MAX || holds(&stamp) {
                        return self.send(path, stamp, body, stamp.len < u64::MAX);
                    }
                }
                Err(Error::Refused(Refusal::Other { code: NO_SUCH_PART, metadata })) => {
                    if let Some(stamp) = Stamp::decode(&metadata).filter(holds) {
                        let all = format!("bytes */{}", stamp.len);
                        let head = head(StatusCode::RANGE_NOT_SATISFIABLE, TEXT);
                        let head = head.header(header::CONTENT_RANGE, all);
                        return Ok(with_text(head, "no such part\n"));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let body = self.cache.get(path).await?;
        self.send(path, body.metadata()?, body, false)
    }

    /// Sends a body of the length that it has: the file may have changed since its stamp.
    fn send(&self, path: &[u8], stamp: Stamp, body: Body, part: bool) -> Result<Answer, Error> {
        let mut head = describe(path, &stamp, body.size().known());
        if part {
            let len = body.size().known().filter(|len| *len > 0).ok_or(Error::Aborted)?;
            let last = stamp.start.saturating_add(len - 1);
            let range = format!("bytes {}-{last}/{}", stamp.start, stamp.len);
            head = head.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
        }
        if body.is_lent() { &self.metrics.lent } else { &self.metrics.streamed }.inc();
        let (bytes, shown) = (self.metrics.bytes.clone(), path.escape_ascii().to_string());
        let pieces = body
            .into_stream()
            .inspect_ok(move |piece| _ = bytes.inc_by(piece.len() as u64))
            .inspect_err(move |error| debug!("{shown} broke off: {error}"))
            .map_ok(Frame::data);
        Ok(made(head, UnsyncBoxBody::new(StreamBody::new(pieces))))
    }
}

fn status_of(error: &Error) -> StatusCode {
    match error {
        Error::Refused(Refusal::NotFound) => StatusCode::NOT_FOUND,
        Error::Refused(Refusal::Invalid) => StatusCode::BAD_REQUEST,
        Error::Refused(Refusal::Failed) => StatusCode::INTERNAL_SERVER_ERROR,
        Error::Misuse(shmferry::error::Misuse::KeyTooLong { .. }) => StatusCode::URI_TOO_LONG,
        Error::Timeout(Awaited::Reply) => StatusCode::GATEWAY_TIMEOUT,
        Error::Timeout(Awaited::Lease | Awaited::QueueRoom)
        | Error::Refused(Refusal::Leaving)
        | Error::Rejected(_) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    }
}

/// What the extension of a name says of the content. Text is taken for UTF-8.
pub fn type_of(name: &[u8]) -> String {
    let kind = mime_guess::from_path(&*String::from_utf8_lossy(name)).first_or_octet_stream();
    let charset = if kind.type_() == "text" { "; charset=utf-8" } else { "" };
    format!("{kind}{charset}")
}

/// The key for something else than all of a file.
fn key(path: &[u8], asked: &str) -> Vec<u8> {
    [path, b"\0", asked.as_bytes()].concat()
}

/// What is said of a file, and of a body if its length is known. Of a file so new that a change
/// might not show in its tag and its date, neither is said.
fn describe(path: &[u8], stamp: &Stamp, len: Option<u64>) -> Builder {
    let mut head = head(StatusCode::OK, &type_of(path));
    if let Some(len) = len {
        head = head.header(header::CONTENT_LENGTH, len).header(header::ACCEPT_RANGES, "bytes");
    }
    match validators(stamp) {
        Some([tag, date]) => head.header(header::ETAG, tag).header(header::LAST_MODIFIED, date),
        None => head,
    }
}

/// A strong tag, and the date.
fn validators(stamp: &Stamp) -> Option<[String; 2]> {
    let date = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(stamp.modified));
    (stamp.version != 0).then(|| [format!("\"{:016x}\"", stamp.version), date])
}

/// Whether the client has it already: by the tag, and only without one by the date.
fn is_fresh(tags: Option<&str>, since: Option<&str>, stamp: &Stamp) -> bool {
    let Some([tag, _]) = validators(stamp) else { return false };
    let modified = UNIX_EPOCH + Duration::from_secs(stamp.modified);
    let is_since = |since| httpdate::parse_http_date(since).is_ok_and(|since| modified <= since);
    let is_tag = |it: &str| ["*", &tag].contains(&it.trim().trim_start_matches("W/"));
    tags.map_or_else(|| since.is_some_and(is_since), |tags| tags.split(',').any(is_tag))
}

fn head(code: StatusCode, content_type: &str) -> Builder {
    let head = Response::builder().status(code).header(header::CONTENT_TYPE, content_type);
    head.header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
}

/// A status, and its name as the body.
fn status(code: StatusCode) -> Answer {
    with_text(head(code, TEXT), format!("{code}\n"))
}

fn with_text(head: Builder, text: impl Into<Bytes>) -> Answer {
    let body = Full::new(text.into()).map_err(|never| match never {});
    made(head, UnsyncBoxBody::new(body))
}

fn made(head: Builder, body: UnsyncBoxBody<Bytes, Error>) -> Answer {
    head.body(body).expect("headers of numbers, dates and fixed words are valid")
}

/// Whether a range ends before it begins, and so is none.
fn is_backward(range: &SyntacticallyCorrectRange) -> bool {
    match (&range.start, &range.end) {
        (StartPosition::Index(first), EndPosition::Index(last)) => last < first,
        _ => false,
    }
}
