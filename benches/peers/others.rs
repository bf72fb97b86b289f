//! Other crates that move bytes between processes, each as its own documentation would have it.

use std::error::Error;
use std::fs::File;
use std::hint;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::{self, MaybeUninit};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{self, Child};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use iceoryx2::port::{client, listener, notifier};
use iceoryx2::prelude::ipc::Service;
use iceoryx2::prelude::{Config, FileName, NodeBuilder, SemanticString, SignalHandlingMode};
use iceoryx2::service::port_factory::{event, request_response};
use ipc_channel::ipc::{self, IpcBytesReceiver, IpcBytesSender, IpcOneShotServer, IpcSender};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use shmem_ipc::sharedring;

use crate::transfer::peers::{connect_unix, serve_requests, unix};
use crate::transfer::{BUFFER, Bytes, Client, FILES, Method, Sink, await_ready, files_beside, say_ready};

pub fn methods() -> Vec<Method> {
    macro_rules! method {
        ($name:literal, $serve:path, $connect:path) => {
            Method {
                name: $name,
                serve: |place| $serve(place).map_err(io::Error::other),
                connect: |place, server| Ok(Box::new($connect(place, server).map_err(io::Error::other)?)),
            }
        };
    }
    vec![
        method!("ipc-channel", serve_channel, Channel::connect),
        method!("iceoryx2, blocking", serve_iceoryx::<false>, Iceoryx::<false>::connect),
        method!("iceoryx2, busy polling", serve_iceoryx::<true>, Iceoryx::<true>::connect),
        method!("shmem-ipc", serve_ring, Ring::connect),
    ]
}

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

// ---------------------------------------------------------------- ipc-channel

// Settings: byte channels both ways, so that nothing is serialised; messages of 256 KiB, which need no
// fragments. `IpcSharedMemory`, made anew for each message, took 2 to 12 times as long.

type Ends = (IpcBytesReceiver, IpcBytesSender);

fn serve_channel(place: &Path) -> Outcome<()> {
    let files = files_beside(place)?;
    let (server, name) = IpcOneShotServer::<Ends>::new()?;
    std::fs::write(place.join("name"), name)?;
    say_ready()?;
    let (_, (requests, responses)) = server.accept()?;
    let mut buffer = vec![0; BUFFER];
    // Ends when the client lets go of the other end.
    while let Ok(request) = requests.recv() {
        let number = usize::from(request[0]);
        let (mut at, len) = (0, FILES[number].0);
        while at < len {
            let read = files[number].read_at(&mut buffer, at)?;
            responses.send(&buffer[..read])?;
            at += read as u64;
        }
    }
    Ok(())
}

struct Channel(IpcBytesSender, IpcBytesReceiver);

impl Channel {
    fn connect(place: &Path, process: &mut Child) -> Outcome<Channel> {
        await_ready(process)?;
        let server = IpcSender::<Ends>::connect(std::fs::read_to_string(place.join("name"))?)?;
        let (requests, requested) = ipc::bytes_channel()?;
        let (responding, responses) = ipc::bytes_channel()?;
        server.send((requested, responding))?;
        Ok(Channel(requests, responses))
    }
}

impl Client for Channel {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let Channel(requests, responses) = self;
        requests.send(&[file as u8])?;
        let mut left = FILES[file].0;
        while left > 0 {
            let bytes = responses.recv().map_err(io::Error::other)?;
            sink(Bytes::Private(&bytes));
            left -= bytes.len() as u64;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------- iceoryx2

// Settings: request and response, the latter slices of 256 KiB that are lent and filled in place, eight in
// all, of which six may wait; no overflow: the server retries until there is room, as is the default.
// Blocking: both sides sleep in listeners, and are notified of each message. Busy polling: neither does,
// but the server sleeps while other methods are timed.

/// Waiting responses; besides them there are the one that the server fills and the one that the client sees.
const WAITING: usize = 6;

/// No file's number: polling is to stop.
const REST: u8 = u8::MAX;

/// All files are named after the server, and are in the bench's directory or in `/dev/shm`.
fn config(place: &Path, server: u32) -> Outcome<Config> {
    let mut config = Config::default();
    config.global.set_root_path(&iceoryx2::prelude::Path::new(place.as_os_str().as_encoded_bytes())?);
    config.global.prefix = FileName::new(format!("shmferry_bench_{server}_").as_bytes())?;
    Ok(config)
}

struct Services {
    transfer: request_response::PortFactory<Service, u8, (), [u8], ()>,
    asked: event::PortFactory<Service>,
    answered: event::PortFactory<Service>,
}

impl Services {
    fn of(config: &Config) -> Outcome<Services> {
        let signals = SignalHandlingMode::Disabled;
        let node = NodeBuilder::new().config(config).signal_handling_mode(signals).create::<Service>()?;
        let transfer = node
            .service_builder(&"transfer".try_into()?)
            .request_response::<u8, [u8]>()
            .enable_safe_overflow_for_requests(false)
            .enable_safe_overflow_for_responses(false)
            .max_clients(1)
            .max_servers(1)
            .max_response_buffer_size(WAITING)
            .max_borrowed_responses_per_pending_response(1)
            .open_or_create()?;
        let asked = node.service_builder(&"asked".try_into()?).event().open_or_create()?;
        let answered = node.service_builder(&"answered".try_into()?).event().open_or_create()?;
        Ok(Services { transfer, asked, answered })
    }
}

fn serve_iceoryx<const POLLS: bool>(place: &Path) -> Outcome<()> {
    let config = config(place, process::id())?;
    answer_iceoryx::<POLLS>(&config, place)?;
    // SAFETY: nobody has it any more: the client's end was what ended the above.
    unsafe { iceoryx2::testing::remove_global_mgmt_segment::<Service>(&config)? };
    Ok(())
}

fn answer_iceoryx<const POLLS: bool>(config: &Config, place: &Path) -> Outcome<()> {
    let files = files_beside(place)?;
    let services = Services::of(config)?;
    let server = services
        .transfer
        .server_builder()
        .initial_max_slice_len(BUFFER)
        .max_loaned_responses_per_request(1)
        .override_response_preallocation(|_| WAITING + 2)
        .create()?;
    let asked = services.asked.listener_builder().create()?;
    let answered = services.answered.notifier_builder().create()?;
    let left = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| -> Outcome<()> {
            let asking = Services::of(config)?.asked.notifier_builder().create()?;
            say_ready()?;
            // Ends when the client lets go of the other end.
            io::copy(&mut io::stdin(), &mut io::sink())?;
            left.store(true, Ordering::Relaxed);
            asking.notify()?;
            Ok(())
        });
        let (mut polling, mut polled) = (false, 0);
        while !left.load(Ordering::Relaxed) {
            let Some(request) = server.receive()? else {
                if polling {
                    pause(&mut polled);
                } else {
                    asked.blocking_wait(|_| ())?;
                    polling = POLLS;
                }
                continue;
            };
            if *request == REST {
                polling = false;
                continue;
            }
            let number = usize::from(*request);
            let (mut at, len) = (0, FILES[number].0);
            while at < len {
                let mut response = request.loan_slice_uninit(BUFFER.min((len - at) as usize))?;
                let (read, rest) = rustix::io::pread(&files[number], response.payload_mut(), at)?;
                assert!(rest.is_empty(), "a file of our own, cut short");
                at += read.len() as u64;
                // SAFETY: the file's bytes fill it.
                unsafe { response.assume_init() }.send()?;
                if !POLLS {
                    answered.notify()?;
                }
            }
        }
        watch.join().expect("the watch")
    })
}

/// Polls at once, mostly: now and then, whoever else needs this processor may have it.
fn pause(polled: &mut u32) {
    *polled += 1;
    match *polled % 100 {
        0 => thread::yield_now(),
        _ => hint::spin_loop(),
    }
}

struct Iceoryx<const POLLS: bool> {
    requests: client::Client<Service, u8, (), [u8], ()>,
    asking: notifier::Notifier<Service>,
    answered: listener::Listener<Service>,
    /// The server does not poll now.
    rests: bool,
}

impl<const POLLS: bool> Iceoryx<POLLS> {
    fn connect(place: &Path, server: &mut Child) -> Outcome<Iceoryx<POLLS>> {
        await_ready(server)?;
        let services = Services::of(&config(place, server.id())?)?;
        let requests = services.transfer.client_builder().create()?;
        let asking = services.asked.notifier_builder().create()?;
        let answered = services.answered.listener_builder().create()?;
        Ok(Iceoryx { requests, asking, answered, rests: true })
    }
}

impl<const POLLS: bool> Client for Iceoryx<POLLS> {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let pending = self.requests.send_copy(file as u8).map_err(io::Error::other)?;
        if mem::replace(&mut self.rests, !POLLS) {
            self.asking.notify().map_err(io::Error::other)?;
        }
        let (mut left, mut polled) = (FILES[file].0, 0);
        while left > 0 {
            match pending.receive().map_err(io::Error::other)? {
                Some(response) => {
                    sink(Bytes::Private(response.payload()));
                    left -= response.payload().len() as u64;
                }
                None if POLLS => pause(&mut polled),
                None => drop(self.answered.blocking_wait(|_| ()).map_err(io::Error::other)?),
            }
        }
        Ok(())
    }

    fn rest(&mut self) -> io::Result<()> {
        if !mem::replace(&mut self.rests, true) {
            self.requests.send_copy(REST).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------- shmem-ipc

// Settings: a ring of 2 MiB, written and read in place, by at most 256 KiB at a time so that both sides
// are at work; its descriptors and the requests go over a Unix socket.

/// With the ring's head, of 64 bytes, whole pages.
const CAPACITY: usize = (2 << 20) - 64;

fn serve_ring(place: &Path) -> Outcome<()> {
    let mut ring = sharedring::Sender::<u8>::new(CAPACITY)?;
    let connection = unix(place)?;
    let fds = [ring.memfd().as_file().as_fd(), ring.empty_signal().as_fd(), ring.full_signal().as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(&connection, &[IoSlice::new(b"!")], &mut control, SendFlags::empty())?;
    serve_requests(&connection, place, |file, number| {
        let (mut at, len) = (0, FILES[number].0);
        while at < len {
            ring.block_until_writable().map_err(io::Error::other)?;
            let mut read = Ok(0);
            let fill = |free: &mut [u8]| {
                let most = free.len().min(BUFFER).min((len - at) as usize);
                read = file.read_at(&mut free[..most], at);
                *read.as_ref().unwrap_or(&0)
            };
            // SAFETY: one sender, here, and one receiver, in the client, which reads what was sent.
            unsafe { ring.send_trusted(fill) }.map_err(io::Error::other)?;
            at += read? as u64;
        }
        Ok(())
    })?;
    Ok(())
}

struct Ring(UnixStream, sharedring::Receiver<u8>);

impl Ring {
    fn connect(place: &Path, server: &mut Child) -> Outcome<Ring> {
        let connection = connect_unix(place, server)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(&connection, &mut [IoSliceMut::new(&mut [0])], &mut control, flags)?;
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.map(File::from).collect(),
            _ => Vec::new(),
        });
        let mut next = || fds.next().ok_or(io::Error::from(io::ErrorKind::UnexpectedEof));
        let ring = sharedring::Receiver::open(CAPACITY, next()?, next()?, next()?)?;
        Ok(Ring(connection, ring))
    }
}

impl Client for Ring {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let Ring(connection, ring) = self;
        connection.write_all(&[file as u8])?;
        let mut left = FILES[file].0;
        while left > 0 {
            ring.block_until_readable().map_err(io::Error::other)?;
            let see = |bytes: &[u8]| {
                let len = bytes.len().min(BUFFER);
                sink(Bytes::Private(&bytes[..len]));
                left -= len as u64;
                len
            };
            // SAFETY: one receiver, here, and one sender, in the server, which leaves alone what it sent.
            unsafe { ring.receive_trusted(see) }.map_err(io::Error::other)?;
        }
        Ok(())
    }
}
