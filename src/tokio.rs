//! The front door for tokio: nobody needs a thread to wait. The feature `tokio`.
//!
//! [`Client`] and [`Server`] do what those [at the root](crate) do, and talk to either kind: the
//! other side cannot tell a task from a thread. Timeouts are by tokio's clock, errors are the same,
//! and so is what they mean.
//!
//! ```
//! use shmferry::Refusal;
//! use shmferry::tokio::{Client, Server};
//!
//! # let dir = tempfile::tempdir().unwrap();
//! # let address = &format!("unix:{}/cache.sock", dir.path().display());
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
//! # runtime.block_on(async {
//! # /*
//! let address = "unix:/run/me/cache.sock";
//! # */
//! let server = Server::bind(address)?.serve(|request| async move {
//!     match request.key() {
//!         b"/greeting" => request.send_bytes(b"hello").await,
//!         _ => request.refuse(Refusal::NotFound),
//!     }
//! })?;
//!
//! let cache = Client::connect(address)?; // in another process; either may start first
//! assert_eq!(cache.get("/greeting").await?.read_all().await?, b"hello");
//! # server.stop();
//! # server.wait().await;
//! # Ok::<(), shmferry::Error>(())
//! # }).unwrap();
//! ```
//!
//! # Where
//! Over sockets (`unix:PATH`) and within a process. A message queue (`mq:/NAME`) has no connection
//! on which a task could be told of what has come, and is refused: there, use the blocking door on
//! a thread.
//!
//! # Dropping a future
//! Any of them may be dropped at any point. A request that was not answered is withdrawn, and its
//! segment comes back, and the server is told. An answer that is not finished is aborted, and its
//! client is told. Reading and writing are cancel-safe: what was not returned has not been taken.
//!
//! A handler of [`Server::serve`] is dropped when its client gives up, or is gone, before the answer
//! is complete; [`on_error`](Server::on_error) is told so
//! ([`ServeError::Unwanted`](crate::ServeError::Unwanted)). What has to run to its end belongs into
//! a task of its own. A blocking server's handler learns of it at its next step.
//!
//! # What takes a thread for a moment
//! Reading a file that is not in the page cache, on the way out or from a
//! [lent file](crate::loan::Loan::file), is done on tokio's blocking threads. Making a connection
//! and replacing a segment is done where the task runs, and takes up to a millisecond.
//!
//! A task that waits tries for up to 50 µs before it sleeps, where that can pay; so long, no other
//! task runs on its thread.

mod answer;
mod body;
mod client;
mod descriptor;
mod incoming;
mod outgoing;
mod server;
mod wait;

pub use body::{Body, BodyStream};
pub use client::Client;
pub use incoming::Incoming;
pub use outgoing::Outgoing;
pub use server::{Server, Serving};
