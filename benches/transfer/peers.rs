//! What a user could take instead: the system's own ways, and the design that this crate started from.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout};
use std::ptr;
use std::slice;

use raw_sync::Timeout;
use raw_sync::events::{Event, EventImpl, EventInit, EventState};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use shared_memory::{Shmem, ShmemConf};

use super::{
    BUFFER, Bytes, Client, FILES, Method, Sink, await_ready, files_beside, report, say_ready,
};

pub fn methods() -> Vec<Method> {
    vec![
        Method { name: "local pread", serve: |_| Ok(()), connect: |place, _| Local::open(place) },
        Method {
            name: "Unix socket, sendfile",
            serve: |place| serve_socket(&unix(place)?, place, send_by_sendfile),
            connect: |place, server| Stream::new(connect_unix(place, server)?),
        },
        Method {
            name: "Unix socket, read and write",
            serve: |place| serve_socket(&unix(place)?, place, send_by_copy),
            connect: |place, server| Stream::new(connect_unix(place, server)?),
        },
        Method {
            name: "TCP loopback, sendfile",
            serve: |place| serve_socket(&tcp(place)?, place, send_by_sendfile),
            connect: |place, server| {
                await_ready(server)?;
                let port: u16 =
                    std::fs::read_to_string(place.join("port"))?.parse().expect("a port");
                let stream = TcpStream::connect(("127.0.0.1", port))?;
                stream.set_nodelay(true)?;
                Stream::new(stream)
            },
        },
        Method {
            name: "pipe, splice",
            serve: serve_pipe,
            connect: |_, server| Ok(Box::new(Pipe::new(server)?)),
        },
        Method {
            name: "descriptor, mmap",
            serve: serve_descriptors,
            connect: |place, server| Ok(Box::new(Mapped(connect_unix(place, server)?))),
        },
        Method {
            name: "descriptor, pread",
            serve: serve_descriptors,
            connect: |place, server| {
                Ok(Box::new(Passed(connect_unix(place, server)?, vec![0; BUFFER])))
            },
        },
        Method {
            name: report::KEPT_AND_MAPPED,
            serve: serve_descriptors,
            connect: |place, server| {
                Ok(Box::new(KeptAndMapped::new(connect_unix(place, server)?)?))
            },
        },
        Method {
            name: "starting design, 64 KiB",
            serve: serve_turns,
            connect: |place, server| Ok(Box::new(Turns::new(connect_unix(place, server)?, place)?)),
        },
    ]
}

// ---------------------------------------------------------------- the limit

struct Local(Vec<File>, Vec<u8>);

impl Local {
    fn open(place: &Path) -> io::Result<Box<dyn Client>> {
        Ok(Box::new(Local(files_beside(place)?, vec![0; BUFFER])))
    }
}

impl Client for Local {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        read_through(&self.0[file], &mut self.1, sink)
    }
}

fn read_through(file: &File, buffer: &mut [u8], sink: Sink<'_>) -> io::Result<()> {
    let mut at = 0;
    loop {
        match file.read_at(buffer, at)? {
            0 => return Ok(()),
            len => sink(Bytes::Private(&buffer[..len])),
        }
        at += buffer.len() as u64;
    }
}

// ---------------------------------------------------------------- sockets

/// A connection that bytes go through, after their length.
trait Connection: Read + Write + AsFd {}
impl<T: Read + Write + AsFd> Connection for T {}

pub fn unix(place: &Path) -> io::Result<UnixStream> {
    let listener = UnixListener::bind(place.join("socket"))?;
    say_ready()?;
    Ok(listener.accept()?.0)
}

pub fn connect_unix(place: &Path, server: &mut Child) -> io::Result<UnixStream> {
    await_ready(server)?;
    UnixStream::connect(place.join("socket"))
}

fn tcp(place: &Path) -> io::Result<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    std::fs::write(place.join("port"), listener.local_addr()?.port().to_string())?;
    say_ready()?;
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Answers requests, each the number of a file in one byte, until the client leaves.
pub fn serve_requests(
    mut connection: impl Read,
    place: &Path,
    mut answer: impl FnMut(&File, usize) -> io::Result<()>,
) -> io::Result<()> {
    let files = files_beside(place)?;
    let mut request = [0];
    while connection.read(&mut request)? == 1 {
        answer(&files[usize::from(request[0])], usize::from(request[0]))?;
    }
    Ok(())
}

fn serve_socket<C>(
    connection: &C,
    place: &Path,
    send: fn(&mut dyn Connection, &File, u64) -> io::Result<()>,
) -> io::Result<()>
where
    for<'c> &'c C: Read + Write,
    C: AsFd,
{
    let mut out = Both(connection);
    serve_requests(connection, place, |file, number| {
        let len = FILES[number].0;
        out.write_all(&len.to_le_bytes())?;
        send(&mut out, file, len)
    })
}

/// A connection by reference, as one thing that reads, writes and has a descriptor.
struct Both<'c, C>(&'c C);

impl<C> Read for Both<'_, C>
where
    for<'c> &'c C: Read,
{
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl<C> Write for Both<'_, C>
where
    for<'c> &'c C: Write,
{
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<C: AsFd> AsFd for Both<'_, C> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn send_by_sendfile(out: &mut dyn Connection, file: &File, len: u64) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let left = (len - at) as usize;
        rustix::fs::sendfile(out.as_fd(), file, Some(&mut at), left)?;
    }
    Ok(())
}

fn send_by_copy(out: &mut dyn Connection, file: &File, _len: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut failed = Ok(());
    read_through(file, &mut buffer, &mut |bytes| {
        if let (Ok(()), Bytes::Private(bytes)) = (&failed, bytes) {
            failed = out.write_all(bytes);
        }
    })?;
    failed
}

struct Stream<C>(C, Vec<u8>);

impl<C: Read + Write + 'static> Stream<C> {
    #[expect(clippy::new_ret_no_self, reason = "all methods give a boxed client")]
    fn new(connection: C) -> io::Result<Box<dyn Client>> {
        Ok(Box::new(Stream(connection, vec![0; BUFFER])))
    }
}

impl<C: Read + Write> Client for Stream<C> {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let Stream(connection, buffer) = self;
        connection.write_all(&[file as u8])?;
        let mut len = [0; 8];
        connection.read_exact(&mut len)?;
        take(connection, u64::from_le_bytes(len), buffer, sink)
    }
}

/// Reads exactly `left` bytes.
fn take(mut from: impl Read, mut left: u64, buffer: &mut [u8], sink: Sink<'_>) -> io::Result<()> {
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let len = from.read(&mut buffer[..most])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        sink(Bytes::Private(&buffer[..len]));
        left -= len as u64;
    }
    Ok(())
}

// ---------------------------------------------------------------- a pipe

/// The largest that Linux gives without privilege.
const PIPE: usize = 1 << 20;

fn serve_pipe(place: &Path) -> io::Result<()> {
    let stdout = io::stdout();
    rustix::pipe::fcntl_setpipe_size(&stdout, PIPE)?;
    say_ready()?;
    serve_requests(io::stdin(), place, |file, number| {
        let (mut at, len) = (0, FILES[number].0);
        while at < len {
            let (left, flags) = ((len - at) as usize, rustix::pipe::SpliceFlags::MOVE);
            rustix::pipe::splice(file, Some(&mut at), &stdout, None, left, flags)?;
        }
        Ok(())
    })
}

struct Pipe(ChildStdin, ChildStdout, Vec<u8>);

impl Pipe {
    fn new(server: &mut Child) -> io::Result<Pipe> {
        await_ready(server)?;
        let (stdin, stdout) =
            (server.stdin.take().expect("piped"), server.stdout.take().expect("piped"));
        Ok(Pipe(stdin, stdout, vec![0; BUFFER]))
    }
}

impl Client for Pipe {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        self.0.write_all(&[file as u8])?;
        take(&mut self.1, FILES[file].0, &mut self.2, sink)
    }
}

// ---------------------------------------------------------------- passed descriptors

fn serve_descriptors(place: &Path) -> io::Result<()> {
    let connection = unix(place)?;
    serve_requests(&connection, place, |file, _| {
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&connection, &[IoSlice::new(b"!")], &mut control, SendFlags::empty())?;
        Ok(())
    })
}

fn ask_for_descriptor(mut connection: &UnixStream, file: usize) -> io::Result<OwnedFd> {
    connection.write_all(&[file as u8])?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(connection, &mut [IoSliceMut::new(&mut [0])], &mut control, flags)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.ok_or(io::ErrorKind::UnexpectedEof.into())
}

struct Passed(UnixStream, Vec<u8>);

impl Client for Passed {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        read_through(&ask_for_descriptor(&self.0, file)?.into(), &mut self.1, sink)
    }
}

struct Mapped(UnixStream);

impl Client for Mapped {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let (fd, len) = (ask_for_descriptor(&self.0, file)?, FILES[file].0 as usize);
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: fresh addresses, and nobody changes or shortens the files of this bench.
        let base = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, flags, &fd, 0)? };
        // SAFETY: the mapping above, alive until below.
        sink(Bytes::Private(unsafe { slice::from_raw_parts(base.cast::<u8>(), len) }));
        // SAFETY: all of it, and the slice is gone.
        unsafe { munmap(base, len)? };
        Ok(())
    }
}

/// All files as they were mapped once: no request is left, only the reading.
struct KeptAndMapped(Vec<&'static [u8]>);

impl KeptAndMapped {
    fn new(connection: UnixStream) -> io::Result<KeptAndMapped> {
        let map = |file: usize| {
            let (fd, len) = (ask_for_descriptor(&connection, file)?, FILES[file].0 as usize);
            let flags = MapFlags::SHARED | MapFlags::POPULATE;
            // SAFETY: fresh addresses, and nobody changes or shortens the files of this bench.
            let base = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, flags, &fd, 0)? };
            // SAFETY: the mapping above, which this process keeps to its end.
            Ok(unsafe { slice::from_raw_parts(base.cast::<u8>(), len) })
        };
        Ok(KeptAndMapped((0..FILES.len()).map(map).collect::<io::Result<_>>()?))
    }
}

impl Client for KeptAndMapped {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        sink(Bytes::Private(self.0[file]));
        Ok(())
    }
}

// ---------------------------------------------------------------- the starting design

/// Shared memory by `shared_memory`, one slot, strict turns by two of `raw_sync`'s auto-reset events.
struct Channel {
    memory: Shmem,
    filled: Box<dyn EventImpl>,
    free: Box<dyn EventImpl>,
}

/// Where the events are, then the chunk's length, then the slot.
const EVENT: usize = 256;
const LENGTH: usize = 2 * EVENT;
const SLOT: usize = 4096;
const SLOT_LEN: usize = 64 << 10;

impl Channel {
    fn create() -> io::Result<Channel> {
        let memory = ShmemConf::new().size(SLOT + SLOT_LEN).create().map_err(io::Error::other)?;
        Channel::with(memory, |at| {
            // SAFETY: memory of our own that nobody else has yet, with room for an event.
            unsafe { Event::new(at, true) }.map_err(|error| io::Error::other(error.to_string()))
        })
    }

    fn open(id: &str) -> io::Result<Channel> {
        let memory = ShmemConf::new().os_id(id).open().map_err(io::Error::other)?;
        Channel::with(memory, |at| {
            // SAFETY: `create` has made an event there.
            unsafe { Event::from_existing(at) }.map_err(|error| io::Error::other(error.to_string()))
        })
    }

    fn with(
        memory: Shmem,
        event: impl Fn(*mut u8) -> io::Result<(Box<dyn EventImpl>, usize)>,
    ) -> io::Result<Channel> {
        // Both lie within the first page of the mapping.
        let base = memory.as_ptr();
        let (filled, free) = (event(base)?.0, event(base.wrapping_add(EVENT))?.0);
        Ok(Channel { memory, filled, free })
    }

    fn signal(event: &dyn EventImpl) -> io::Result<()> {
        event.set(EventState::Signaled).map_err(|error| io::Error::other(error.to_string()))
    }

    fn wait(event: &dyn EventImpl) -> io::Result<()> {
        event.wait(Timeout::Infinite).map_err(|error| io::Error::other(error.to_string()))
    }

    /// The slot, while it is our turn.
    fn slot(&mut self) -> &mut [u8] {
        // SAFETY: within the mapping; only one side touches it at a time, by strict turns.
        unsafe { slice::from_raw_parts_mut(self.memory.as_ptr().add(SLOT), SLOT_LEN) }
    }

    /// Where the chunk's length is, while it is our turn.
    fn length(&mut self) -> &mut u64 {
        // SAFETY: within the mapping, aligned; only one side touches it at a time, by strict turns.
        unsafe { &mut *self.memory.as_ptr().add(LENGTH).cast::<u64>() }
    }
}

fn serve_turns(place: &Path) -> io::Result<()> {
    let mut channel = Channel::create()?;
    std::fs::write(place.join("id"), channel.memory.get_os_id())?;
    let connection = unix(place)?;
    serve_requests(&connection, place, |file, number| {
        let (mut at, len) = (0, FILES[number].0);
        while at < len {
            let read = file.read_at(channel.slot(), at)?;
            *channel.length() = read as u64;
            Channel::signal(&*channel.filled)?;
            Channel::wait(&*channel.free)?;
            at += read as u64;
        }
        Ok(())
    })
}

struct Turns(UnixStream, Channel);

impl Turns {
    fn new(connection: UnixStream, place: &Path) -> io::Result<Turns> {
        let id = std::fs::read_to_string(place.join("id"))?;
        Ok(Turns(connection, Channel::open(&id)?))
    }
}

impl Client for Turns {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let Turns(connection, channel) = self;
        connection.write_all(&[file as u8])?;
        let mut left = FILES[file].0;
        while left > 0 {
            Channel::wait(&*channel.filled)?;
            let len = *channel.length() as usize;
            sink(Bytes::Private(&channel.slot()[..len]));
            Channel::signal(&*channel.free)?;
            left -= len as u64;
        }
        Ok(())
    }
}
