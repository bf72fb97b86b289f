//! The GETFILE codec of a client: encodes requests, parses replies in both dialects, without I/O.
//! What the servers have of it is here as well.
//!
//! Some programs in the field write the spec dialect a little differently. Accepted as well are one
//! space before CR LF CR LF, and `0` after the status of a reply that has no body:
//! `GETFILE FILE_NOT_FOUND 0 CR LF CR LF`. Neither is ever written.
//!
//! Parsing is incremental and stateless: hand over all bytes received so far, again after every
//! read. A header that no further bytes can make valid is reported at its first wrong byte, and
//! none is `Incomplete` beyond [`MAX_REPLY_HEADER_LEN`], so a buffer of that length is enough.

pub use shmferry_examples::getfile::*;

/// The longest valid reply header of any dialect, in bytes: the longest length, the tolerated
/// space, the blank line.
pub const MAX_REPLY_HEADER_LEN: usize = OK_START.len() + MAX_LENGTH_DIGITS + 1 + BLANK_LINE.len();

/// What the bytes of a reply received so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParsedReply {
    /// A whole header.
    Complete {
        /// What it says.
        reply: Reply,
        /// Bytes of the header; the body starts after them.
        consumed: usize,
    },
    /// The start of a valid header.
    Incomplete,
    /// No valid header of this dialect starts like this.
    Invalid(MalformedReply),
}

/// Why bytes are no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedReply {
    /// Another scheme or an unknown status, or the other dialect.
    #[error("no known status")]
    Start,
    /// A length that is missing, not decimal, or not below 2^64.
    #[error("the length is not a decimal number below 2^64")]
    Length,
    /// A length, or a status without one, followed by something other than what ends the header.
    #[error("the status or length is not followed by the end of the header")]
    End,
}

/// Writes the request for `path`, if a request can carry it.
pub fn encode_request(path: &[u8]) -> Result<Vec<u8>, Malformed> {
    check_path(path)?;
    Ok([REQUEST_START, path, BLANK_LINE].concat())
}

/// Parses the reply header that `bytes`, all that was received so far, starts with.
pub fn parse_reply(bytes: &[u8], dialect: Dialect) -> ParsedReply {
    match reply_header(bytes, dialect) {
        Ok((reply, rest)) => ParsedReply::Complete { reply, consumed: bytes.len() - rest.len() },
        Err(Stop::Incomplete) => ParsedReply::Incomplete,
        Err(Stop::Invalid(why)) => ParsedReply::Invalid(why),
    }
}

const OK_START: &[u8] = b"GETFILE OK ";

/// Digits of 2^64 - 1. More are refused even where leading zeros keep the value small: they would
/// make the header unbounded.
const MAX_LENGTH_DIGITS: usize = 20;

/// Why the parser did not reach the end of a header.
enum Stop {
    Incomplete,
    Invalid(MalformedReply),
}

impl From<MalformedReply> for Stop {
    fn from(why: MalformedReply) -> Self {
        Self::Invalid(why)
    }
}

/// The reply, and what follows its header.
fn reply_header(bytes: &[u8], dialect: Dialect) -> Result<(Reply, &[u8]), Stop> {
    for reply in [Reply::FileNotFound, Reply::Error, Reply::Invalid] {
        let header = encode_reply(reply, dialect);
        // The classic dialect writes `ERROR` for `Invalid`, which is then not reached.
        let status = match dialect {
            Dialect::Spec => header.strip_suffix(BLANK_LINE).unwrap_or(&header),
            Dialect::Classic => &header[..],
        };
        match after(bytes, status, MalformedReply::Start) {
            Ok(rest) => return Ok((reply, after_status(rest, dialect)?)),
            Err(Stop::Incomplete) => return Err(Stop::Incomplete),
            Err(Stop::Invalid(_)) => {} // another status
        }
    }
    let rest = after(bytes, OK_START, MalformedReply::Start)?;
    let (len, rest) = length(rest)?;
    let body = match dialect {
        Dialect::Spec => after_blank_line(rest)?,
        Dialect::Classic => after(rest, b" ", MalformedReply::End)?,
    };
    Ok((Reply::Ok { len }, body))
}

/// What follows the rest of a header without a body, from behind its status on.
fn after_status(rest: &[u8], dialect: Dialect) -> Result<&[u8], Stop> {
    match (dialect, rest.first()) {
        (Dialect::Classic, _) => Ok(rest), // its status ends the header
        (Dialect::Spec, None | Some(b' ' | b'\r')) => {
            after_blank_line(rest.strip_prefix(b" 0").unwrap_or(rest))
        }
        (Dialect::Spec, Some(_)) => Err(MalformedReply::Start.into()), // a longer word
    }
}

/// What follows a reply's blank line, before which one space is tolerated.
fn after_blank_line(bytes: &[u8]) -> Result<&[u8], Stop> {
    after(bytes.strip_prefix(b" ").unwrap_or(bytes), BLANK_LINE, MalformedReply::End)
}

/// The decimal number that `bytes` starts with, and what follows it.
fn length(bytes: &[u8]) -> Result<(u64, &[u8]), Stop> {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = bytes.split_at(digits);
    if digits.len() > MAX_LENGTH_DIGITS || (digits.is_empty() && !rest.is_empty()) {
        return Err(MalformedReply::Length.into());
    }
    let value = digits
        .iter()
        .try_fold(0u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
    Ok((value.ok_or(MalformedReply::Length)?, rest))
}

/// What follows `expected` at the start of `bytes`.
fn after<'a>(
    bytes: &'a [u8],
    expected: &[u8],
    otherwise: MalformedReply,
) -> Result<&'a [u8], Stop> {
    match bytes.strip_prefix(expected) {
        Some(rest) => Ok(rest),
        None if expected.starts_with(bytes) => Err(Stop::Incomplete),
        None => Err(Stop::Invalid(otherwise)),
    }
}
