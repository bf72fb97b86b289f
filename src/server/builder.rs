//! The bounds of a server, and how it takes its address.

use std::path::PathBuf;
use std::sync::Arc;

use crate::address::Address;
#[cfg(feature = "posix-mq")]
use crate::channel::PosixMq;
use crate::channel::{RequestQueue, Seqpacket, SeqpacketQueue};
use crate::error::{Error, Result};
use crate::loan::LoanLimits;
use crate::peer::Peer;
use crate::protocol::DEFAULT_TIMEOUT;

use super::{Hook, ServeError, Server};

/// Bounds for a new [`Server`]. Each has a default.
#[derive(Clone, Debug, Default)]
#[must_use = "describes a server: `bind` makes it"]
pub struct ServerBuilder {
    max_clients: Option<u32>,
    max_segments: Option<u32>,
    max_bytes: Option<u64>,
    loans: Option<LoanLimits>,
    users: Vec<u32>,
}

impl ServerBuilder {
    /// The most clients at a time; 256 by default. Sockets only.
    pub fn max_clients(mut self, clients: u32) -> Self {
        self.max_clients = Some(clients);
        self
    }

    /// The most segments that one client may bring; 1,024 by default.
    pub fn max_segments(mut self, segments: u32) -> Self {
        self.max_segments = Some(segments);
        self
    }

    /// The most bytes of segments that one client may bring; 4 GiB by default. Sockets only.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// The most that is lent to one client at a time: bytes of sealed memory, and loans; 1 GiB and
    /// 1,024 by default. Beyond it, answers go through the segment. Sockets only.
    pub fn lend_at_most(mut self, bytes: u64, loans: u32) -> Self {
        self.loans = Some(LoanLimits { bytes, count: loans });
        self
    }

    /// Lets clients of this user in, too, besides our own. Sockets only; the socket's file must be
    /// made accessible to that user.
    pub fn allow_user(mut self, uid: u32) -> Self {
        self.users.push(uid);
        self
    }

    /// Takes the address.
    ///
    /// # Errors
    /// Those of [`Server::bind`].
    pub fn bind<A>(self, address: A) -> Result<Server>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let hook = Arc::<Hook>::default();
        let queue: Arc<dyn RequestQueue> = match address.try_into()? {
            Address::Unix(path) => Arc::new(self.socket(path, &hook)?),
            #[cfg(feature = "posix-mq")]
            Address::Mq(name) => {
                let mut queue = PosixMq::new(name)?.on_rejected(tell_rejected(&hook));
                if let Some(segments) = self.max_segments {
                    queue = queue.max_segments(segments);
                }
                Arc::new(queue.bind()?)
            }
            #[cfg(not(feature = "posix-mq"))]
            Address::Mq(_) => return Err(crate::error::Misuse::NoPosixMq.into()),
        };
        Ok(Server { queue, timeout: DEFAULT_TIMEOUT, hook })
    }

    pub(crate) fn socket(self, path: PathBuf, hook: &Arc<Hook>) -> Result<SeqpacketQueue> {
        let mut socket = Seqpacket::new(path).on_rejected(tell_rejected(hook));
        for uid in self.users {
            socket = socket.allow_user(uid);
        }
        if let Some(clients) = self.max_clients {
            socket = socket.max_clients(clients);
        }
        if let Some(segments) = self.max_segments {
            socket = socket.max_segments(segments);
        }
        if let Some(bytes) = self.max_bytes {
            socket = socket.max_bytes(bytes);
        }
        if let Some(LoanLimits { bytes, count }) = self.loans {
            socket = socket.lend_at_most(bytes, count);
        }
        socket.bind()
    }
}

/// Has the hook told of clients that are rejected.
fn tell_rejected(hook: &Arc<Hook>) -> impl Fn(Option<Peer>, &Error) + Send + Sync + 'static {
    let hook = Arc::clone(hook);
    move |peer, error| hook.tell(&ServeError::Rejected { peer, reason: error.to_string() })
}
