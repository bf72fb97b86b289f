//! Where a server is found: `unix:PATH` for a socket, `mq:/NAME` for a POSIX message queue.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Misuse, Result};

/// Where a server is found, as text: `unix:PATH` or `mq:/NAME`.
///
/// [`Client::connect`](crate::Client::connect) and [`Server::bind`](crate::Server::bind) take the
/// text itself.
///
/// ```
/// use shmferry::Address;
///
/// let address: Address = "unix:/run/me/cache.sock".parse()?;
/// assert_eq!(address, Address::Unix("/run/me/cache.sock".into()));
/// assert_eq!(address.to_string(), "unix:/run/me/cache.sock");
/// assert!("cache.sock".parse::<Address>().is_err());
/// # Ok::<(), shmferry::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A Unix socket at this path: segments are sealed memory without a name.
    Unix(PathBuf),
    /// A POSIX message queue of this name, which begins with a slash: segments are named shared
    /// memory. Needs the feature `posix-mq`, which is on by default.
    Mq(String),
}

impl Address {
    /// The socket `NAME.sock` in this user's runtime directory, `$XDG_RUNTIME_DIR/shmferry` or
    /// `/tmp/shmferry-UID`: where a server and its clients meet unless told otherwise.
    ///
    /// # Errors
    /// [`Error::Misuse`] when that directory is not this user's alone, or the name has a slash.
    #[cfg(target_os = "linux")]
    pub fn of_user(name: &str) -> Result<Address> {
        if name.is_empty() || name.contains(['/', '\0']) {
            return Err(Misuse::Address(name.to_owned()).into());
        }
        crate::channel::Seqpacket::runtime_path(name).map(Address::Unix)
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
            Some(("mq", name)) => match name.strip_prefix('/') {
                Some("" | "." | "..") | None => Err(Misuse::QueueName(name.to_owned()).into()),
                Some(rest) if rest.len() > QUEUE_NAME_LIMIT || rest.contains(['/', '\0']) => {
                    Err(Misuse::QueueName(name.to_owned()).into())
                }
                Some(_) => Ok(Address::Mq(name.to_owned())),
            },
            _ => Err(Misuse::Address(text.to_owned()).into()),
        }
    }
}

/// The longest queue name, without its slash, that leaves room for what is put around it in file
/// names.
const QUEUE_NAME_LIMIT: usize = 200;

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Mq(name) => write!(f, "mq:{name}"),
        }
    }
}

/// Takes any text that parses.
impl TryFrom<&str> for Address {
    type Error = Error;

    fn try_from(text: &str) -> Result<Address> {
        text.parse()
    }
}

impl TryFrom<&String> for Address {
    type Error = Error;

    fn try_from(text: &String) -> Result<Address> {
        text.parse()
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Address> {
        text.parse()
    }
}

impl From<&Address> for Address {
    fn from(address: &Address) -> Address {
        address.clone()
    }
}

/// A socket's path.
impl From<&Path> for Address {
    fn from(path: &Path) -> Address {
        Address::Unix(path.to_owned())
    }
}

/// For addresses that need no parsing.
impl From<Infallible> for Error {
    fn from(never: Infallible) -> Error {
        match never {}
    }
}
