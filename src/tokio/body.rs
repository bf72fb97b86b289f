//! What comes behind a key, as a task reads it.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_core::Stream;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::error::{Awaited, Error, Result};
use crate::loan::LentBody;
use crate::protocol::{Awaiting, Metadata, Receiver, Receiving, Reply, ShmTransfer, Size};

use super::client::Route;
use super::wait::{Step, Wait};

/// The most bytes of a lent file that are read at once.
const AT_ONCE: usize = 256 << 10;
/// The peer's word for the size is no reason to take more memory than this at once.
const MOST_AT_ONCE: u64 = 64 << 20;

/// The bytes behind a key, as they come: [`crate::Body`], without a thread that waits.
///
/// Read it ([`AsyncRead`]), take it piece by piece ([`into_stream`](Self::into_stream)), or all of
/// it at once. A transfer that breaks off is an error, never a short read. Its segment goes back to
/// the client when it is dropped, read to the end or not.
#[must_use = "a body that is dropped is not read"]
pub struct Body {
    source: Source,
    size: Size,
    timeout: Duration,
    wait: Wait,
    /// Attends to the connection as long as this.
    _route: Arc<Route>,
}

enum Source {
    Streamed(Box<ShmTransfer<Receiver, Receiving>>),
    Lent(Lent),
}

/// What was lent: sealed memory is at hand, a file is read on another thread.
struct Lent {
    /// Not here while it is read from.
    body: Option<Box<LentBody>>,
    /// Reads the next piece.
    reading: Option<JoinHandle<(Box<LentBody>, Result<Bytes>)>>,
    /// What has been read, and not been returned yet.
    piece: Bytes,
}

impl Body {
    pub(super) fn new(reply: Reply, timeout: Duration, route: Arc<Route>) -> Body {
        let (source, size) = match reply {
            Reply::Found(transfer) => {
                let size = transfer.size();
                (Source::Streamed(Box::new(transfer)), size)
            }
            Reply::Lent(body) => {
                let size = Size::Known(body.size());
                let body = Some(Box::new(body));
                (Source::Lent(Lent { body, reading: None, piece: Bytes::new() }), size)
            }
            Reply::Refused(_) => unreachable!("a refusal has no body"),
        };
        Body { source, size, timeout, wait: Wait::default(), _route: route }
    }

    /// How many bytes are to come in all, as the server has announced.
    pub fn size(&self) -> Size {
        self.size
    }

    /// What the server attached. To be read before the bytes.
    ///
    /// # Errors
    /// [`Error::Peer`] when it does not read as an `M`.
    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        match &self.source {
            Source::Streamed(transfer) => transfer.metadata(),
            Source::Lent(Lent { body: Some(body), .. }) => body.metadata(),
            Source::Lent(_) => Err(crate::error::Misuse::TransferOver.into()),
        }
    }

    /// Whether the server has lent the bytes: then no segment is in use for them.
    pub fn is_lent(&self) -> bool {
        matches!(self.source, Source::Lent(_))
    }

    /// How long this body waits without progress, instead of the client's timeout.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Reads everything that is still to come into memory.
    ///
    /// # Errors
    /// What ended the transfer, or [`Error::Timeout`] when the server made no progress. What had
    /// come by then is lost: to keep it, read.
    pub async fn read_all(mut self) -> Result<Vec<u8>> {
        let announced = self.size.known().unwrap_or(0).min(MOST_AT_ONCE);
        let mut bytes = Vec::with_capacity(announced as usize);
        while let Some(piece) = poll_fn(|context| self.poll_piece(context)).await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Everything that is still to come. Without a copy, if the server has lent sealed memory;
    /// otherwise gathered into memory.
    ///
    /// # Errors
    /// Those of [`read_all`](Self::read_all).
    pub async fn into_bytes(mut self) -> Result<Bytes> {
        if self.is_lent() {
            // Of sealed memory, the first piece is all of it.
            let first = poll_fn(|context| self.poll_piece(context)).await?.unwrap_or_default();
            return match poll_fn(|context| self.poll_piece(context)).await? {
                None => Ok(first),
                Some(second) => {
                    let mut bytes = BytesMut::from(first);
                    bytes.extend_from_slice(&second);
                    bytes.extend_from_slice(&self.read_all().await?);
                    Ok(bytes.freeze())
                }
            };
        }
        Ok(self.read_all().await?.into())
    }

    /// The bytes, piece by piece: what was lent without a copy, and all of it as one piece; what
    /// comes through the segment slot by slot, and each copied out of it.
    pub fn into_stream(self) -> BodyStream {
        BodyStream { body: Some(self) }
    }

    /// The next piece; `None` at the end.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        match &mut self.source {
            Source::Lent(lent) => lent.poll_piece(context),
            Source::Streamed(transfer) => {
                if !ready!(poll_open(&mut self.wait, context, self.timeout, transfer))? {
                    return Poll::Ready(Ok(None));
                }
                let mut piece = BytesMut::zeroed(transfer.unread());
                transfer.read_open(&mut piece);
                Poll::Ready(Ok(Some(piece.freeze())))
            }
        }
    }
}

/// Waits for a chunk, as long as the timeout; `false` at the end.
fn poll_open(
    wait: &mut Wait,
    context: &mut Context<'_>,
    timeout: Duration,
    transfer: &mut ShmTransfer<Receiver, Receiving>,
) -> Poll<Result<bool>> {
    let end = wait.end_of(timeout);
    let opened = ready!(wait.poll(context, end, &mut Chunk(transfer)));
    Poll::Ready(opened.unwrap_or(Err(Error::Timeout(Awaited::FilledSlot))))
}

impl AsyncRead for Body {
    /// What is not returned has not been taken.
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Body { source, wait, timeout, .. } = self.get_mut();
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        match source {
            Source::Lent(lent) => {
                if lent.piece.is_empty() {
                    lent.piece = ready!(lent.poll_piece(context))?.unwrap_or_default();
                }
                let piece = lent.piece.split_to(lent.piece.len().min(into.remaining()));
                into.put_slice(&piece);
            }
            Source::Streamed(transfer) => {
                if ready!(poll_open(wait, context, *timeout, transfer))? {
                    let read = transfer.read_open(into.initialize_unfilled());
                    into.advance(read);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Lent {
    /// The next piece; `None` at the end.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        if !self.piece.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.piece))));
        }
        if self.reading.is_none() {
            let Some(mut body) = self.body.take() else {
                return Poll::Ready(Err(crate::error::Misuse::TransferOver.into()));
            };
            if let Some(sealed) = body.take_sealed() {
                self.body = Some(body);
                return Poll::Ready(Ok((!sealed.is_empty()).then(|| sealed.into())));
            }
            self.reading = Some(spawn_blocking(move || {
                let mut piece = BytesMut::zeroed(AT_ONCE.min(body.left() as usize));
                let read = io::Read::read(&mut *body, &mut piece);
                let read = read.map_err(Error::from).map(|len| piece.split_to(len).freeze());
                (body, read)
            }));
        }
        let Some(reading) = &mut self.reading else { unreachable!("it has just begun") };
        let read = ready!(Pin::new(reading).poll(context));
        self.reading = None;
        // The runtime ends: nobody reads any more.
        let (body, read) = read.map_err(|error| Error::Source(io::Error::other(error)))?;
        self.body = Some(body);
        Poll::Ready(read.map(|piece| (!piece.is_empty()).then_some(piece)))
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("tokio::Body")
            .field("size", &self.size)
            .field("is_lent", &self.is_lent())
            .finish_non_exhaustive()
    }
}

/// The pieces of a [`Body`].
#[derive(Debug)]
#[must_use = "a stream does nothing unless it is polled"]
pub struct BodyStream {
    /// None after the end, or an error.
    body: Option<Body>,
}

impl Stream for BodyStream {
    type Item = Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let piece = ready!(body.poll_piece(context));
        if !matches!(piece, Ok(Some(_))) {
            this.body = None; // the segment goes back
        }
        Poll::Ready(piece.transpose())
    }
}

/// Waits for a chunk.
struct Chunk<'t>(&'t mut ShmTransfer<Receiver, Receiving>);

impl Step for Chunk<'_> {
    type Output = Result<bool>;

    fn attempt(&mut self, task: Option<&Waker>) -> Poll<Result<bool>> {
        self.0.poll_open(task)
    }

    fn side(&mut self) -> &mut dyn Awaiting {
        self.0.side()
    }
}
