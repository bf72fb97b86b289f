//! Typed metadata: up to 1 KiB that is sent beside status and size.

/// A value that a sender can attach to its announcement, and a receiver can read from it.
///
/// Both sides must use the same type. A value that does not decode is reported as the peer's fault.
///
/// ```
/// use shmferry::Metadata;
///
/// /// When a file was last modified, in seconds since 1970.
/// #[derive(Debug, PartialEq)]
/// struct Modified(u64);
///
/// impl Metadata for Modified {
///     fn encode(&self) -> Vec<u8> {
///         self.0.to_le_bytes().to_vec()
///     }
///     fn decode(bytes: &[u8]) -> Option<Self> {
///         Some(Modified(u64::from_le_bytes(bytes.try_into().ok()?)))
///     }
/// }
///
/// assert_eq!(Modified::decode(&Modified(7).encode()), Some(Modified(7)));
/// assert_eq!(Modified::decode(b"no"), None);
/// ```
pub trait Metadata: Sized {
    /// The value as bytes, at most [`METADATA_LIMIT`](crate::protocol::METADATA_LIMIT) of them.
    fn encode(&self) -> Vec<u8>;

    /// The value from bytes that a peer wrote; `None` if they are invalid.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

/// No metadata.
impl Metadata for () {
    #[inline]
    fn encode(&self) -> Vec<u8> {
        Vec::new()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.is_empty().then_some(())
    }
}

impl Metadata for Vec<u8> {
    fn encode(&self) -> Vec<u8> {
        self.clone()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(bytes.to_vec())
    }
}

impl Metadata for String {
    fn encode(&self) -> Vec<u8> {
        self.clone().into_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        String::from_utf8(bytes.to_vec()).ok()
    }
}
