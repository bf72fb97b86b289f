//! The transport by names: requests through a POSIX message queue, segments in named shared memory.
//!
//! Feature `posix-mq`. On systems other than Linux there is only the memory.

#[cfg(target_os = "linux")]
mod builder;
#[cfg(target_os = "linux")]
mod lifeline;
#[cfg(target_os = "linux")]
mod mqueue;
#[cfg(target_os = "linux")]
mod name;
mod named;
#[cfg(target_os = "linux")]
mod queue;
#[cfg(target_os = "linux")]
mod requester;
#[cfg(target_os = "linux")]
pub(crate) mod wire;

#[cfg(target_os = "linux")]
pub use builder::PosixMq;
pub use named::Named;
#[cfg(target_os = "linux")]
pub use queue::PosixMqQueue;
#[cfg(target_os = "linux")]
pub use requester::PosixMqRequester;
