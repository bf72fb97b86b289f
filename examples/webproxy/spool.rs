//! Spooling: a body of unknown length is read to its end, so that its length can be announced.

use std::fmt;
use std::io::{self, Read, Seek, Write};

use shmferry::workers::blocking;

use super::client::{Body, Client, Found};
use super::proxy::Miss;

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

impl Spooler<'_> {
    /// Reads a body to its end, if that is possible; `fail` is told why it is not. Looks between two
    /// reads whether the client has left.
    pub fn fill(
        &self,
        mut body: impl Read,
        fail: impl Fn(&dyn fmt::Display) -> Miss,
    ) -> Result<Found, Miss> {
        let io_failed = |error: io::Error| fail(&error);
        let mut spooled = tempfile::spooled_tempfile(IN_MEMORY);
        let mut buffer = vec![0; BUFFER];
        let mut len = 0;
        loop {
            if self.client.has_left().map_err(io_failed)? {
                return Err(Miss::ClientLeft);
            }
            let read = match blocking(|| body.read(&mut buffer)) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(io_failed)?,
            };
            len += read as u64;
            if len > self.limit {
                let limit = self.limit;
                let why = "a body of unknown length exceeds";
                return Err(fail(&format_args!("{why} {limit} bytes (--spool-limit)")));
            }
            spooled.write_all(&buffer[..read]).map_err(io_failed)?;
        }
        spooled.rewind().map_err(io_failed)?;
        Ok(Found { len, body: Body::Stream(Box::new(spooled)) })
    }
}
