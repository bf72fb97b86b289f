//! Spooling: a body of unknown length is read to its end, so that its length can be announced.

use std::fmt;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, Write};

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
#[derive(Debug)]
pub enum Unspooled {
    /// The body is longer than the limit.
    TooLong {
        /// The limit, in bytes.
        limit: u64,
    },
    /// The client left before its body was there.
    ClientLeft,
    /// The body cannot be read to its end, or not be written.
    Io(io::Error),
}

impl fmt::Display for Unspooled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unspooled::TooLong { limit } => {
                write!(f, "a body of unknown length exceeds {limit} bytes (--spool-limit)")
            }
            Unspooled::ClientLeft => f.write_str("the client left while its body was spooled"),
            Unspooled::Io(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for Unspooled {
    fn from(error: io::Error) -> Self {
        Unspooled::Io(error)
    }
}

impl Spooler<'_> {
    /// Reads a body to its end. Looks between two reads whether the client has left.
    ///
    /// # Errors
    /// [`Unspooled`] says which.
    pub fn fill(&self, mut body: impl Read) -> Result<Found, Unspooled> {
        let mut memory = Vec::new();
        let mut file: Option<File> = None;
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
            let bytes = &buffer[..read];
            match &mut file {
                Some(file) => file.write_all(bytes)?,
                None if memory.len() + read <= IN_MEMORY => memory.extend_from_slice(bytes),
                None => {
                    let mut unnamed = tempfile::tempfile()?;
                    unnamed.write_all(&memory)?;
                    unnamed.write_all(bytes)?;
                    memory = Vec::new();
                    file = Some(unnamed);
                }
            }
        }
        let body: Box<dyn Read> = match file {
            Some(mut file) => {
                file.rewind()?;
                Box::new(file)
            }
            None => Box::new(Cursor::new(memory)),
        };
        Ok(Found { len, body: Body::Stream(body) })
    }
}
