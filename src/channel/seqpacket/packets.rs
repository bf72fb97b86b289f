//! What loans need of a connection: to send and take messages without waiting.
//!
//! A trait, so that models run the code of both sides without a socket.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::error::Result;
use crate::peer::Socket;
use crate::sync::Deadline;

use super::client::{Received, receive};
use super::send;

pub(super) trait Packets: Send + Sync {
    /// Sends one message, with a descriptor if one is given; fails if there is no room for it now.
    fn send_now(&self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()>;

    /// Takes one message and its descriptors, if there is one.
    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>>;
}

impl Packets for Socket {
    fn send_now(&self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        send(self, message, fd, Deadline::after(Duration::ZERO))
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>> {
        receive(self, buffer)
    }
}
