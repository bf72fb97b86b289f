//! The name of a queue: checked, and what else stands under it while a server lives.

use std::fmt;
use std::path::PathBuf;

use rustix::process::geteuid;

use crate::error::Misuse;

/// A slash, and bytes without another.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Name(String);

/// Longest name that leaves room for what is put around it in file names.
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

    /// Locked by the server, and tells its pid.
    pub(super) fn lock(&self) -> PathBuf {
        self.file("lock")
    }

    /// Held by the server, and hangs up on its clients when it dies.
    pub(super) fn lifeline(&self) -> PathBuf {
        self.file("life")
    }

    fn file(&self, kind: &str) -> PathBuf {
        let (user, name) = (geteuid().as_raw(), &self.0[1..]);
        format!("/dev/shm/shmferry-queue-{user}-{name}.{kind}").into()
    }
}

/// As the programs' flags have it.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mq:{}", self.0)
    }
}

#[cfg(test)]
mod tests;
