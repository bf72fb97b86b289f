//! `Lent`: bytes that a user holds as long as they like.

use std::fmt;
use std::ops::{Deref, Range};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::content::{Content, Sealed};

/// Bytes that never change: lent by a server, without a copy, or gathered into memory.
///
/// Derefs to `[u8]`. Cheap to clone, and independent of the client and the server that it came
/// from: it outlives both. As long as it is held, it keeps the memory of the whole loan.
///
/// ```
/// use shmferry::loan::Lent;
///
/// let bytes = Lent::from(b"hello".to_vec());
/// let other = bytes.clone();
/// std::thread::spawn(move || assert_eq!(&other[..], b"hello")).join().unwrap();
/// assert_eq!(&bytes.slice(1..3)[..], b"el");
/// ```
#[derive(Clone)]
pub struct Lent {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Sealed(Arc<Sealed>),
    Gathered(Arc<Vec<u8>>),
}

impl Lent {
    /// A part of sealed memory; the range must be within it.
    pub(super) fn of_sealed(sealed: &Arc<Sealed>, range: Range<usize>) -> Lent {
        debug_assert!(range.end <= sealed.bytes().len());
        Lent { owner: Owner::Sealed(Arc::clone(sealed)), range }
    }

    /// The same bytes, or a part of them, without a copy.
    ///
    /// # Panics
    /// If the range is not within it, as with a slice.
    pub fn slice(&self, range: Range<usize>) -> Lent {
        let within = range.start <= range.end && range.end <= self.range.len();
        assert!(within, "{range:?} is not within {} bytes", self.range.len());
        let range = self.range.start + range.start..self.range.start + range.end;
        Lent { owner: self.owner.clone(), range }
    }

    /// The descriptor of the sealed memory, and where in it these bytes are: to map it elsewhere,
    /// to `sendfile` it, to hand it on. `None` for bytes that were gathered.
    pub fn memory(&self) -> Option<(BorrowedFd<'_>, Range<usize>)> {
        match &self.owner {
            Owner::Sealed(sealed) => Some((sealed.fd(), self.range.clone())),
            Owner::Gathered(_) => None,
        }
    }

    /// The sealed memory, and where in it these bytes are.
    pub(super) fn content(&self) -> Option<(Content, Range<usize>)> {
        match &self.owner {
            Owner::Sealed(sealed) => {
                Some((Content::Sealed(Arc::clone(sealed)), self.range.clone()))
            }
            Owner::Gathered(_) => None,
        }
    }
}

impl Deref for Lent {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        let all = match &self.owner {
            Owner::Sealed(sealed) => sealed.bytes(),
            Owner::Gathered(bytes) => &bytes[..],
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Lent {
    fn from(bytes: Vec<u8>) -> Lent {
        let range = 0..bytes.len();
        Lent { owner: Owner::Gathered(Arc::new(bytes)), range }
    }
}

#[cfg(feature = "bytes")]
impl From<Lent> for bytes::Bytes {
    /// Without a copy: the loan is held as long as the `Bytes`.
    fn from(lent: Lent) -> bytes::Bytes {
        bytes::Bytes::from_owner(lent)
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_sealed = matches!(self.owner, Owner::Sealed(_));
        f.debug_struct("Lent").field("len", &self.len()).field("is_sealed", &is_sealed).finish()
    }
}
