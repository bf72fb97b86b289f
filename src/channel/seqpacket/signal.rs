//! Signals over one connection: tells the other process that its tasks have something to take.
//!
//! Each side has a word in the ring's memory: not zero while it asks for a signal. It raises the
//! word to a new number each time. The other side lowers it to zero after it has sent the signal,
//! and lowers only the number that it has read before, never a later one. So one signal is on its
//! way for all tasks of a process, however many wait. The orderings are argued in
//! [`peer::link`](crate::peer).

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::peer::{Signal, Socket};
use crate::segment::Words;
use crate::sync::atomic::{AtomicU64, Relaxed};

use super::packets::Packets;
use super::ring::{CLIENT_ASKS, SERVER_ASKS};
use super::wire::Message;

#[cfg(all(test, loom))]
mod model;

/// One side's means to signal the other.
pub(super) struct SocketSignal<P = Socket> {
    words: Arc<Words>,
    /// Where this side asks, and where the other does.
    ours: usize,
    theirs: usize,
    /// How often this side has asked.
    asked: AtomicU64,
    socket: Arc<P>,
}

impl<P: Packets> SocketSignal<P> {
    pub(super) fn of_client(words: &Arc<Words>, socket: &Arc<P>) -> SocketSignal<P> {
        SocketSignal::new(words, socket, CLIENT_ASKS, SERVER_ASKS)
    }

    pub(super) fn of_server(words: &Arc<Words>, socket: &Arc<P>) -> SocketSignal<P> {
        SocketSignal::new(words, socket, SERVER_ASKS, CLIENT_ASKS)
    }

    fn new(words: &Arc<Words>, socket: &Arc<P>, ours: usize, theirs: usize) -> SocketSignal<P> {
        let (words, socket) = (Arc::clone(words), Arc::clone(socket));
        SocketSignal { words, ours, theirs, asked: AtomicU64::new(0), socket }
    }

    /// Sends the signal. A full connection signals as well: who reads it looks for all that has
    /// come.
    fn send(&self) -> Result<()> {
        match self.socket.send_now(&Message::Wakeup.encode(), None) {
            Err(Error::Timeout(_)) => Ok(()),
            sent => sent,
        }
    }
}

impl<P: Packets> Signal for SocketSignal<P> {
    fn ask(&self) {
        let number = self.asked.fetch_add(1, Relaxed) + 1;
        self.words[self.ours].swap(number, Relaxed);
    }

    fn is_asked(&self) -> bool {
        self.words[self.theirs].load(Relaxed) != 0
    }

    #[cold]
    fn signal(&self) {
        let number = self.words[self.theirs].load(Relaxed);
        // With the connection gone, its end wakes all who wait.
        if number != 0 && self.send().is_ok() {
            // Fails if another thread was quicker, or if the peer has asked anew.
            let _ = self.words[self.theirs].compare_exchange(number, 0, Relaxed, Relaxed);
        }
    }

    #[cold]
    fn tell(&self) {
        // Fails if the connection is gone, whose end tells more, or if there is no memory: then the
        // peer learns of it at its next step.
        let _ = self.send();
    }
}
