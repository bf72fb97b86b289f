//! The name of a queue: its check, and the names of the server's other files.

use std::fmt;
use std::path::PathBuf;

use rustix::process::geteuid;

use crate::error::Misuse;

/// A queue's name: a slash, followed by bytes without another.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Name(String);

/// The longest name: file names that contain it stay within the system's limit.
const LIMIT: usize = 200;

impl Name {
    pub(super) fn parse(name: String) -> Result<Name, Misuse> {
        match name.strip_prefix('/') {
            Some("" | "." | "..") | None => Err(Misuse::QueueName(name)),
            Some(rest) if rest.len() > LIMIT || rest.contains(['/', '\0']) => {
                Err(Misuse::QueueName(name))
            }
            Some(_) => Ok(Name(name)),
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The lock file, with the server's pid.
    pub(super) fn lock(&self) -> PathBuf {
        self.file("lock")
    }

    /// The server's lifeline, which hangs up on its clients when it dies.
    pub(super) fn lifeline(&self) -> PathBuf {
        self.file("life")
    }

    fn file(&self, kind: &str) -> PathBuf {
        let (user, name) = (geteuid().as_raw(), &self.0[1..]);
        format!("/dev/shm/shmferry-queue-{user}-{name}.{kind}").into()
    }
}

/// The form used in the programs' flags.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mq:{}", self.0)
    }
}

#[cfg(test)]
mod tests;
