//! Where clients come in: the listening socket, and how accepting ends.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use shmferry_examples::program::Pace;

/// Clients that wait to be accepted, as the system caps it.
const BACKLOG: i32 = 4096;

/// Accepts clients until it is closed.
pub struct Listener {
    socket: TcpListener,
    /// Where it listens, with the port that the system chose.
    pub address: SocketAddr,
    closed: AtomicBool,
    pace: Pace,
}

impl Listener {
    /// Listens on an address; on `::`, on all of IPv6 and IPv4.
    pub fn bind(address: SocketAddr) -> io::Result<Listener> {
        let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.ip() == Ipv6Addr::UNSPECIFIED {
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        // Connections inherit it: the end of a chunk never waits for a delayed acknowledgement.
        sockopt::set_tcp_nodelay(&socket, true)?;
        net::bind(&socket, &address)?;
        net::listen(&socket, BACKLOG)?;
        let socket = TcpListener::from(socket);
        let address = socket.local_addr()?;
        Ok(Listener { socket, address, closed: AtomicBool::default(), pace: Pace::default() })
    }

    /// Waits for a client; `None` once it is closed. Its socket is in non-blocking mode: `sendfile`
    /// to it cannot block then.
    pub fn accept(&self) -> Option<TcpStream> {
        loop {
            match net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => return Some(socket.into()),
                Err(_) if self.closed.load(Ordering::Acquire) => return None,
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    self.pace.warn(format_args!("cannot accept: {error}"));
                    thread::sleep(Duration::from_millis(100)); // leaves a failing system alone
                }
            }
        }
    }

    /// Wakes all who wait for a client, and lets no more in.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // Fails only on a socket that does not listen.
        let _ = net::shutdown(&self.socket, Shutdown::Both);
    }
}
