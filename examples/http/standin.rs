//! Stands in for `shmferry::tokio` until that exists: the blocking client on tokio's threads.

use std::future::Future;
use std::io::{self, Read};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_core::Stream;
use shmferry::segment::PoolStats;
use shmferry::{Address, ClientBuilder, Error, Metadata, Result, Size};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::task::{JoinHandle, spawn_blocking};

/// Bytes that are read at once.
const PIECE: usize = 128 << 10;

/// In place of `ClientBuilder::connect_tokio`.
pub trait ConnectTokio {
    fn connect_tokio<A>(self, address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>;
}

impl ConnectTokio for ClientBuilder {
    fn connect_tokio<A>(self, address: A) -> Result<Client>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        self.connect(address).map(Client)
    }
}

#[derive(Clone)]
pub struct Client(shmferry::Client);

impl Client {
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Body> {
        let (client, key) = (self.0.clone(), key.as_ref().to_vec());
        let body = joined(spawn_blocking(move || client.get(key)).await)?;
        Ok(Body { body: Some(body), reading: None, piece: Bytes::new() })
    }

    pub fn stats(&self) -> PoolStats {
        self.0.stats()
    }
}

pub struct Body {
    /// Unless it is being read.
    body: Option<shmferry::Body>,
    reading: Option<JoinHandle<(shmferry::Body, io::Result<Bytes>)>>,
    piece: Bytes,
}

impl Body {
    pub fn size(&self) -> Size {
        self.whole().size()
    }

    pub fn metadata<M: Metadata>(&self) -> Result<M> {
        self.whole().metadata()
    }

    pub fn is_lent(&self) -> bool {
        self.whole().is_lent()
    }

    pub async fn read_all(mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    pub fn into_stream(mut self) -> BodyStream {
        match self.body.take_if(|body| body.is_lent()) {
            Some(body) => BodyStream::Lent(Some(body)),
            None => BodyStream::Streamed(self),
        }
    }

    fn whole(&self) -> &shmferry::Body {
        self.body.as_ref().expect("nothing was read yet")
    }
}

impl AsyncRead for Body {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.piece.is_empty() {
            if let Some(mut body) = self.body.take() {
                self.reading = Some(spawn_blocking(move || {
                    let mut piece = vec![0; PIECE];
                    let read = body.read(&mut piece);
                    let read = read.map(|len| {
                        piece.truncate(len);
                        piece.into()
                    });
                    (body, read)
                }));
            }
            let reading = self.reading.as_mut().expect("there is no body while it is read");
            let (body, piece) = joined(ready!(pin!(reading).poll(context)));
            (self.body, self.reading, self.piece) = (Some(body), None, piece?);
        }
        let len = self.piece.len().min(into.remaining());
        into.put_slice(&self.piece[..len]);
        self.piece.advance(len);
        Poll::Ready(Ok(()))
    }
}

pub enum BodyStream {
    Lent(Option<shmferry::Body>),
    Streamed(Body),
}

impl Stream for BodyStream {
    type Item = Result<Bytes>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes>>> {
        let body = match &mut *self {
            BodyStream::Lent(body) => {
                let bytes = body.take().map(|body| body.into_bytes().map(Bytes::from));
                return Poll::Ready(bytes.filter(|it| !it.as_ref().is_ok_and(Bytes::is_empty)));
            }
            BodyStream::Streamed(body) => body,
        };
        let mut piece = vec![0; PIECE];
        let mut buffer = ReadBuf::new(&mut piece);
        ready!(Pin::new(body).poll_read(context, &mut buffer))?;
        let len = buffer.filled().len();
        piece.truncate(len);
        Poll::Ready((len > 0).then(|| Ok(piece.into())))
    }
}

fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
