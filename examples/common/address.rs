//! Where the cache is: the address that `simplecached --listen` and `webproxy --cache` share.

use std::{fmt, path::PathBuf, str::FromStr};

use shmferry::channel::{PosixMq, Seqpacket};

/// A request queue's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket: `unix:PATH`.
    Unix(PathBuf),
    /// A POSIX message queue: `mq:/NAME`.
    Mq(String),
}

impl Address {
    /// The socket in the user's runtime directory, where both programs meet unless told otherwise.
    pub fn default_of_user() -> shmferry::Result<Address> {
        Seqpacket::runtime_path("simplecached").map(Address::Unix)
    }
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
            Some(("mq", name)) if PosixMq::new(name).is_ok() => Ok(Address::Mq(name.to_owned())),
            _ => Err("an address is unix:PATH or mq:/NAME"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Mq(name) => write!(f, "mq:{name}"),
        }
    }
}
