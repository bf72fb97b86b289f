//! Spooling: a body of unknown length is read to its end, so that its length can be announced.

use std::io::{self, Read, Seek, Write};

use super::client::{Body, Client, Found};

/// The longest body that is kept in memory.
const IN_MEMORY: usize = 64 << 10;

/// Bytes that are read at a time.
const BUFFER: usize = 64 << 10;

/// Where a client's body is spooled: in memory, or in an unnamed temporary file where it is long.
pub struct Spooler<'a> {
    /// The longest body, in bytes.
    pub limit: u64,
    /// Who wants it.
    pub client: &'a Client,
}

/// Why a body was not spooled. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum Unspooled {
    #[error("a body of unknown length exceeds {limit} bytes (--spool-limit)")]
    TooLong { limit: u64 },
    #[error("the client left while its body was spooled")]
    ClientLeft,
    /// The body cannot be read to its end, or not be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Spooler<'_> {
    /// Reads a body to its end. Looks between two reads whether the client has left.
    ///
    /// # Errors
    /// [`Unspooled`] says which.
    pub fn fill(&self, mut body: impl Read) -> Result<Found, Unspooled> {
        let mut spooled = tempfile::spooled_tempfile(IN_MEMORY);
        let mut buffer = vec![0; BUFFER];
        let mut len = 0;
        loop {
            if self.client.has_left()? {
                return Err(Unspooled::ClientLeft);
            }
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            len += read as u64;
            if len > self.limit {
                return Err(Unspooled::TooLong { limit: self.limit });
            }
            spooled.write_all(&buffer[..read])?;
        }
        spooled.rewind()?;
        Ok(Found { len, body: Body::Stream(Box::new(spooled)) })
    }
}
