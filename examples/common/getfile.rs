//! The GETFILE codec: encodes and parses request and reply headers in both dialects, without I/O.
//!
//! ```text
//! request  GETFILE GET <path> CR LF CR LF            the same in both dialects
//! reply    GETFILE OK <length> CR LF CR LF <body>    spec
//!          GETFILE FILE_NOT_FOUND CR LF CR LF        so do ERROR and INVALID
//! reply    GETFILE OK <length> <body>                classic: one space, then the body
//!          GETFILE FILE_NOT_FOUND 0 LF               so does ERROR; there is no INVALID
//! ```
//!
//! Some programs in the field write the spec dialect a little differently. Accepted as well are one
//! space before CR LF CR LF, in requests and replies, and `0` after the status of a reply that has
//! no body: `GETFILE FILE_NOT_FOUND 0 CR LF CR LF`. Neither is ever written.
//!
//! Parsing is incremental and stateless: hand over all bytes received so far, again after every
//! read. A header that no further bytes can make valid is reported at its first wrong byte, and
//! none is `Incomplete` beyond [`MAX_REQUEST_LEN`] or [`MAX_REPLY_HEADER_LEN`], so a buffer of
//! that length is enough.

use std::{fmt, str::FromStr};

/// The longest path a request may name, in bytes.
pub const MAX_PATH_LEN: usize = 4096;

/// The longest valid request, in bytes: the longest path, the tolerated space, the blank line.
pub const MAX_REQUEST_LEN: usize = REQUEST_START.len() + MAX_PATH_LEN + 1 + BLANK_LINE.len();

/// The longest valid reply header of any dialect, in bytes: the longest length, the tolerated
/// space, the blank line.
pub const MAX_REPLY_HEADER_LEN: usize = OK_START.len() + MAX_LENGTH_DIGITS + 1 + BLANK_LINE.len();

/// How replies are written; requests are the same in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Every header ends with a blank line.
    Spec,
    /// The dialect of widely deployed course-work programs: one space ends an `OK` header, and the
    /// other replies carry a length of zero and end with a line feed.
    Classic,
}

impl FromStr for Dialect {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "spec" => Ok(Self::Spec),
            "classic" => Ok(Self::Classic),
            _ => Err("a dialect is either spec or classic"),
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Spec => "spec",
            Self::Classic => "classic",
        })
    }
}

/// What a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The file follows.
    Ok {
        /// Bytes in the body.
        len: u64,
    },
    /// The client asked for what is not there.
    FileNotFound,
    /// The server failed.
    Error,
    /// The request was malformed or incomplete. The classic dialect has no word for that and
    /// says `ERROR`.
    Invalid,
}

/// What the bytes of a request received so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParsedRequest<'a> {
    /// A whole request; whatever follows it is to be ignored.
    Complete {
        /// The path asked for: starts with `/`, passes [`check_path`].
        path: &'a [u8],
    },
    /// The start of a valid request. At the end of the stream it counts as malformed.
    Incomplete,
    /// No valid request starts like this.
    Invalid(Malformed),
}

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
    Invalid(Malformed),
}

/// Why bytes are no GETFILE header, or a path cannot be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// A request with another scheme or method, or other spacing.
    RequestStart,
    /// A path that is empty or relative.
    PathStart,
    /// A path longer than [`MAX_PATH_LEN`].
    PathTooLong,
    /// A path with a byte in it that no request can carry.
    PathByte,
    /// A path followed by another token, or by something that only resembles a blank line.
    RequestEnd,
    /// A reply with another scheme or an unknown status, or in the other dialect.
    ReplyStart,
    /// A length that is missing, not decimal, or not below 2^64.
    Length,
    /// A length, or a status without one, followed by something other than what ends the header.
    ReplyEnd,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RequestStart => "the request does not start with \"GETFILE GET \"",
            Self::PathStart => "the path must start with \"/\"",
            Self::PathTooLong => "the path is longer than 4096 bytes",
            Self::PathByte => "the path holds a space, a line break or a NUL",
            Self::RequestEnd => "the path is not followed by CR LF CR LF",
            Self::ReplyStart => "no known status",
            Self::Length => "the length is not a decimal number below 2^64",
            Self::ReplyEnd => "the status or length is not followed by the end of the header",
        })
    }
}

impl std::error::Error for Malformed {}

/// Checks that a request can carry `path`: it starts with `/`, is not too long, and holds no
/// space, line break or NUL.
pub fn check_path(path: &[u8]) -> Result<(), Malformed> {
    if path.first() != Some(&b'/') {
        Err(Malformed::PathStart)
    } else if path.len() > MAX_PATH_LEN {
        Err(Malformed::PathTooLong)
    } else if path.iter().any(|byte| matches!(byte, b'\0' | b' ' | b'\r' | b'\n')) {
        Err(Malformed::PathByte)
    } else {
        Ok(())
    }
}

/// Writes the request for `path`, if a request can carry it.
pub fn encode_request(path: &[u8]) -> Result<Vec<u8>, Malformed> {
    check_path(path)?;
    Ok([REQUEST_START, path, BLANK_LINE].concat())
}

/// Parses the request that `bytes`, all that was received so far, starts with.
pub fn parse_request(bytes: &[u8]) -> ParsedRequest<'_> {
    match request_path(bytes) {
        Ok(path) => ParsedRequest::Complete { path },
        Err(Stop::Incomplete) => ParsedRequest::Incomplete,
        Err(Stop::Invalid(why)) => ParsedRequest::Invalid(why),
    }
}

/// Writes a reply's header; after `Ok` the body follows.
pub fn encode_reply(reply: Reply, dialect: Dialect) -> Vec<u8> {
    match reply {
        Reply::Ok { len } => [OK_START, len.to_string().as_bytes(), ok_end(dialect)].concat(),
        Reply::FileNotFound => not_found(dialect).to_vec(),
        Reply::Error => error(dialect).to_vec(),
        Reply::Invalid => invalid(dialect).to_vec(),
    }
}

/// Parses the reply header that `bytes`, all that was received so far, starts with.
pub fn parse_reply(bytes: &[u8], dialect: Dialect) -> ParsedReply {
    match reply_header(bytes, dialect) {
        Ok((reply, rest)) => ParsedReply::Complete { reply, consumed: bytes.len() - rest.len() },
        Err(Stop::Incomplete) => ParsedReply::Incomplete,
        Err(Stop::Invalid(why)) => ParsedReply::Invalid(why),
    }
}

const REQUEST_START: &[u8] = b"GETFILE GET ";
const OK_START: &[u8] = b"GETFILE OK ";
const BLANK_LINE: &[u8] = b"\r\n\r\n";

/// Digits of 2^64 - 1. More are refused even where leading zeros keep the value small: they would
/// make the header unbounded.
const MAX_LENGTH_DIGITS: usize = 20;

fn ok_end(dialect: Dialect) -> &'static [u8] {
    match dialect {
        Dialect::Spec => BLANK_LINE,
        Dialect::Classic => b" ",
    }
}

fn not_found(dialect: Dialect) -> &'static [u8] {
    match dialect {
        Dialect::Spec => b"GETFILE FILE_NOT_FOUND\r\n\r\n",
        Dialect::Classic => b"GETFILE FILE_NOT_FOUND 0\n",
    }
}

fn error(dialect: Dialect) -> &'static [u8] {
    match dialect {
        Dialect::Spec => b"GETFILE ERROR\r\n\r\n",
        Dialect::Classic => b"GETFILE ERROR 0\n",
    }
}

fn invalid(dialect: Dialect) -> &'static [u8] {
    match dialect {
        Dialect::Spec => b"GETFILE INVALID\r\n\r\n",
        Dialect::Classic => error(dialect),
    }
}

/// Why a parser did not reach the end of a header.
enum Stop {
    Incomplete,
    Invalid(Malformed),
}

impl From<Malformed> for Stop {
    fn from(why: Malformed) -> Self {
        Self::Invalid(why)
    }
}

fn request_path(bytes: &[u8]) -> Result<&[u8], Stop> {
    let rest = after(bytes, REQUEST_START, Malformed::RequestStart)?;
    let path_len = rest.iter().position(|byte| matches!(byte, b' ' | b'\r' | b'\n'));
    let (path, end) = rest.split_at(path_len.unwrap_or(rest.len()));
    if rest.is_empty() {
        return Err(Stop::Incomplete);
    }
    check_path(path)?;
    let end = end.strip_prefix(b" ").unwrap_or(end);
    after(end, BLANK_LINE, Malformed::RequestEnd)?;
    Ok(path)
}

/// The reply, and what follows its header.
fn reply_header(bytes: &[u8], dialect: Dialect) -> Result<(Reply, &[u8]), Stop> {
    let without_length = [
        (not_found(dialect), Reply::FileNotFound),
        (error(dialect), Reply::Error),
        (invalid(dialect), Reply::Invalid),
    ];
    for (header, reply) in without_length {
        let status = match dialect {
            Dialect::Spec => header.strip_suffix(BLANK_LINE).unwrap_or(header),
            Dialect::Classic => header,
        };
        match after(bytes, status, Malformed::ReplyStart) {
            Ok(rest) => return Ok((reply, after_status(rest, dialect)?)),
            Err(Stop::Incomplete) => return Err(Stop::Incomplete),
            Err(Stop::Invalid(_)) => {} // another status
        }
    }
    let rest = after(bytes, OK_START, Malformed::ReplyStart)?;
    let (len, rest) = length(rest)?;
    let body = match dialect {
        Dialect::Spec => after_blank_line(rest)?,
        Dialect::Classic => after(rest, ok_end(dialect), Malformed::ReplyEnd)?,
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
        (Dialect::Spec, Some(_)) => Err(Malformed::ReplyStart.into()), // a longer word
    }
}

/// What follows a reply's blank line, before which one space is tolerated.
fn after_blank_line(bytes: &[u8]) -> Result<&[u8], Stop> {
    after(bytes.strip_prefix(b" ").unwrap_or(bytes), BLANK_LINE, Malformed::ReplyEnd)
}

/// The decimal number that `bytes` starts with, and what follows it.
fn length(bytes: &[u8]) -> Result<(u64, &[u8]), Stop> {
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = bytes.split_at(digits);
    if digits.len() > MAX_LENGTH_DIGITS || (digits.is_empty() && !rest.is_empty()) {
        return Err(Malformed::Length.into());
    }
    let value = digits
        .iter()
        .try_fold(0u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
    Ok((value.ok_or(Malformed::Length)?, rest))
}

/// What follows `expected` at the start of `bytes`.
fn after<'a>(bytes: &'a [u8], expected: &[u8], otherwise: Malformed) -> Result<&'a [u8], Stop> {
    match bytes.strip_prefix(expected) {
        Some(rest) => Ok(rest),
        None if expected.starts_with(bytes) => Err(Stop::Incomplete),
        None => Err(Stop::Invalid(otherwise)),
    }
}
