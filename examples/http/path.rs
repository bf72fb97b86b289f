//! Paths of requests, and back: decoded once, and refused unless they are normal (rule S4).

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// All but what RFC 3986 calls unreserved.
const RESERVED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// The key of a path; `None` for one with a bad escape, a NUL, an escaped slash, a part that is
/// `.`, `..` or empty.
pub fn decode(path: &str) -> Option<Vec<u8>> {
    let is_hex = |escape: &str| {
        escape.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
    };
    if !path.starts_with('/') || !path.split('%').skip(1).all(is_hex) {
        return None;
    }
    let parts: Vec<Vec<u8>> =
        path[1..].split('/').map(|part| percent_decode_str(part).collect()).collect();
    let is_odd = |part: &Vec<u8>| {
        matches!(&part[..], b"" | b"." | b"..") || part.iter().any(|byte| matches!(byte, 0 | b'/'))
    };
    // Only the last may be empty, and that names a directory.
    let named = parts.strip_suffix(&[Vec::new()]).unwrap_or(&parts);
    if named.iter().any(is_odd) {
        return None;
    }
    Some([b"/", &parts.join(&b'/')[..]].concat())
}

/// A key, or a name, as a path in a page.
pub fn encode(key: &[u8]) -> String {
    percent_encode(key, RESERVED).to_string()
}
