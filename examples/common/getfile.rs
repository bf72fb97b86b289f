//! The GETFILE codec of a server: parses requests, encodes replies in both dialects, without I/O.
//!
//! ```text
//! request  GETFILE GET <path> CR LF CR LF            the same in both dialects
//! reply    GETFILE OK <length> CR LF CR LF <body>    spec
//!          GETFILE FILE_NOT_FOUND CR LF CR LF        so do ERROR and INVALID
//! reply    GETFILE OK <length> <body>                classic: one space, then the body
//!          GETFILE FILE_NOT_FOUND 0 LF               so does ERROR; there is no INVALID
//! ```
//! One space before a request's CR LF CR LF is accepted as well: some programs write it.

use std::fmt;

/// The longest path a request may name, in bytes.
pub const MAX_PATH_LEN: usize = 4096;

/// The longest valid request, in bytes: the longest path, the tolerated space, the blank line.
pub const MAX_REQUEST_LEN: usize = REQUEST_START.len() + MAX_PATH_LEN + 1 + BLANK_LINE.len();

/// What every request begins with.
pub const REQUEST_START: &[u8] = b"GETFILE GET ";
/// What ends every request, and in the spec dialect every header of a reply.
pub const BLANK_LINE: &[u8] = b"\r\n\r\n";

/// How replies are written; requests are the same in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    /// Every header ends with a blank line.
    Spec,
    /// The dialect of widely deployed course-work programs: one space ends an `OK` header, and the
    /// other replies carry a length of zero and end with a line feed.
    Classic,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Spec { "spec" } else { "classic" })
    }
}

/// What a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The file follows: so many bytes.
    Ok { len: u64 },
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
    /// A whole request for a path that passes [`check_path`]. What follows it is to be ignored.
    Complete { path: &'a [u8] },
    /// The start of a valid request. At the end of the stream it counts as malformed.
    Incomplete,
    /// No valid request starts like this.
    Invalid(Malformed),
}

/// Why bytes are no request, or a path cannot be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the request does not start with \"GETFILE GET \"")]
    RequestStart,
    #[error("the path must start with \"/\"")]
    PathStart,
    #[error("the path is longer than {MAX_PATH_LEN} bytes")]
    PathTooLong,
    #[error("the path holds a space, a line break or a NUL")]
    PathByte,
    /// Another token follows, or something that only resembles a blank line.
    #[error("the path is not followed by CR LF CR LF")]
    RequestEnd,
}

/// Checks that a request can carry `path`.
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

/// Parses the request that `bytes`, all that was received so far, starts with. What no further
/// bytes can make valid is reported at its first wrong byte, and nothing is
/// [`Incomplete`](ParsedRequest::Incomplete) beyond [`MAX_REQUEST_LEN`].
pub fn parse_request(bytes: &[u8]) -> ParsedRequest<'_> {
    let unfinished = |bytes, expected: &[u8], otherwise| match expected.starts_with(bytes) {
        true => ParsedRequest::Incomplete,
        false => ParsedRequest::Invalid(otherwise),
    };
    let Some(rest) = bytes.strip_prefix(REQUEST_START) else {
        return unfinished(bytes, REQUEST_START, Malformed::RequestStart);
    };
    let path_len = rest.iter().position(|byte| matches!(byte, b' ' | b'\r' | b'\n'));
    let (path, end) = rest.split_at(path_len.unwrap_or(rest.len()));
    let end = end.strip_prefix(b" ").unwrap_or(end);
    match check_path(path) {
        _ if rest.is_empty() => ParsedRequest::Incomplete,
        Err(why) => ParsedRequest::Invalid(why),
        Ok(()) if end.starts_with(BLANK_LINE) => ParsedRequest::Complete { path },
        Ok(()) => unfinished(end, BLANK_LINE, Malformed::RequestEnd),
    }
}

/// Writes a reply's header; after `Ok` the body follows.
pub fn encode_reply(reply: Reply, dialect: Dialect) -> Vec<u8> {
    let text = match (reply, dialect) {
        (Reply::Ok { len }, Dialect::Spec) => return format!("GETFILE OK {len}\r\n\r\n").into(),
        (Reply::Ok { len }, Dialect::Classic) => return format!("GETFILE OK {len} ").into(),
        (Reply::FileNotFound, Dialect::Spec) => "GETFILE FILE_NOT_FOUND\r\n\r\n",
        (Reply::FileNotFound, Dialect::Classic) => "GETFILE FILE_NOT_FOUND 0\n",
        (Reply::Error, Dialect::Spec) => "GETFILE ERROR\r\n\r\n",
        (Reply::Error | Reply::Invalid, Dialect::Classic) => "GETFILE ERROR 0\n",
        (Reply::Invalid, Dialect::Spec) => "GETFILE INVALID\r\n\r\n",
    };
    text.into()
}
