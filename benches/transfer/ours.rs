//! This crate's own ways: both transports, several numbers of slots, within one process, and what
//! is lent.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read};
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::thread;

use shmferry::channel::{InProcess, Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::loan::Loan;
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool};
use shmferry::{Deadline, Incoming, Server};

use super::{
    BUFFER, Bytes, Client, Method, Sink, TIMEOUT, await_ready, files_beside, report, say_ready,
};

/// Bytes of payload in a segment, however many slots it is cut into.
const SEGMENT: u64 = 2 << 20;

pub fn methods() -> Vec<Method> {
    macro_rules! seqpacket {
        ($name:literal, $slots:literal, $copies:literal) => {
            Method {
                name: $name,
                serve: |place| serve(&Seqpacket::new(place.join("queue")).bind()?, place),
                connect: |place, server| {
                    await_ready(server)?;
                    let pool = pool::<Memfd>($slots)?;
                    let requester = Seqpacket::new(place.join("queue")).requester(&pool)?;
                    Ok(ours(pool, requester, $copies))
                },
            }
        };
    }
    vec![
        seqpacket!("shmferry, socket, 1 slot", 1, false),
        seqpacket!("shmferry, socket, 4 slots", 4, false),
        seqpacket!("shmferry, socket, 4 slots, copied out", 4, true),
        seqpacket!("shmferry, socket, 8 slots", 8, false),
        Method {
            name: "shmferry, message queue, 4 slots",
            serve: |place| serve(&PosixMq::new(queue_name(std::process::id()))?.bind()?, place),
            connect: |_, server| {
                await_ready(server)?;
                let pool = pool::<Named>(4)?;
                let requester = PosixMq::new(queue_name(server.id()))?.requester(&pool);
                Ok(ours(pool, requester, false))
            },
        },
        Method {
            name: "shmferry, in process, 4 slots",
            serve: |_| Ok(()),
            connect: |place, _| {
                let queue = InProcess::bounded(1);
                let (files, taking) = (files_beside(place)?, queue.clone());
                thread::spawn(move || answer(&taking, &files));
                Ok(ours(pool::<Memfd>(4)?, queue, false))
            },
        },
        Method {
            name: report::STREAMED,
            serve: |place| serve_front(place, Ok, |asked, file| asked.send_file(file)),
            connect: |place, server| FrontDoor::connect(place, server, Taken::Chunks),
        },
        Method {
            name: report::LENT_SEALED,
            serve: |place| {
                serve_front(place, |file| Loan::from_file(&file), |asked, loan| asked.lend(loan))
            },
            connect: |place, server| FrontDoor::connect(place, server, Taken::Slice),
        },
        Method {
            name: report::LENT_AS_A_FILE,
            serve: |place| serve_front(place, Loan::file, |asked, loan| asked.lend(loan)),
            connect: |place, server| FrontDoor::connect(place, server, Taken::Read),
        },
        Method {
            name: "shmferry, lent, first request",
            serve: |place| {
                let seal_and_lend =
                    |asked: Incoming, file: &File| asked.lend(&Loan::from_file(file)?);
                serve_front(place, Ok, seal_and_lend)
            },
            connect: |place, server| FrontDoor::connect(place, server, Taken::SliceOnce),
        },
    ]
}

fn queue_name(server: u32) -> String {
    format!("/shmferry-bench-{server}")
}

fn pool<B: Backing>(slots: u32) -> io::Result<SegmentPool<B>> {
    Ok(SegmentPool::builder().segments(1).segment_len(SEGMENT).slots(slots).create()?)
}

fn serve(queue: &dyn RequestQueue, place: &Path) -> io::Result<()> {
    let files = files_beside(place)?;
    say_ready()?;
    thread::scope(|scope| {
        scope.spawn(|| {
            // Ends when the client lets go of the other end.
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            queue.close();
        });
        answer(queue, &files);
    });
    Ok(())
}

fn answer(queue: &dyn RequestQueue, files: &[File]) {
    while let Ok(transfer) = queue.recv(Deadline::NEVER) {
        let file = &files[usize::from(transfer.key()[0])];
        let len = file.metadata().expect("a file of our own").len();
        // A client that left early is no failure of ours.
        let _ = transfer.accept(len).and_then(|sending| sending.send_file(file));
    }
}

struct Ours<B: Backing> {
    pool: SegmentPool<B>,
    requester: Arc<dyn Requester<B>>,
    /// Copies the bytes out, rather than reading them where they are.
    copies: bool,
    buffer: Vec<u8>,
}

fn ours<B: Backing>(
    pool: SegmentPool<B>,
    requester: impl Requester<B> + 'static,
    copies: bool,
) -> Box<dyn Client> {
    Box::new(Ours { pool, requester: Arc::new(requester), copies, buffer: vec![0; BUFFER] })
}

impl<B: Backing> Client for Ours<B> {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let deadline = Deadline::after(TIMEOUT);
        let (request, transfer) = self.pool.lease(deadline)?.request([file as u8])?;
        self.requester.send(request, deadline).map_err(shmferry::Error::from)?;
        let Reply::Found(mut body) = transfer.reply(deadline)? else { panic!("refused") };
        while let Some(mut chunk) = body.next_chunk(deadline)? {
            if self.copies {
                while !chunk.is_empty() {
                    let len = chunk.copy_to(&mut self.buffer);
                    sink(Bytes::Private(&self.buffer[..len]));
                }
            } else {
                sink(Bytes::Shared(chunk.bytes()));
            }
        }
        Ok(())
    }
}

// ---------------------------------------------------------------- by the front door

/// Requests at work at once in a server behind the front door, as the documents have it.
const WORKERS: usize = 8;

/// Serves what each file was made into.
fn serve_front<T: Send + Sync + 'static>(
    place: &Path,
    make: impl Fn(File) -> shmferry::Result<T>,
    answer: impl Fn(Incoming, &T) -> shmferry::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let made: Vec<T> =
        files_beside(place)?.into_iter().map(make).collect::<shmferry::Result<_>>()?;
    let server = Server::bind(place.join("queue").as_path())?;
    let serving = server.serve(WORKERS, move |asked| {
        let file = usize::from(asked.key()[0]);
        answer(asked, &made[file])
    })?;
    say_ready()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    serving.stop();
    serving.wait();
    Ok(())
}

/// How the client takes the bytes.
#[derive(Clone, Copy, PartialEq)]
enum Taken {
    /// Chunk by chunk, where they lie; it is lent nothing.
    Chunks,
    /// All at once, where they lie.
    Slice,
    /// All at once, from a loan that nobody has asked for before. Once the account is full, which
    /// is after 256 loans, the next comes through the segment, and makes room for 32.
    SliceOnce,
    /// By reading into a buffer.
    Read,
}

struct FrontDoor {
    client: shmferry::Client,
    taken: Taken,
    buffer: Vec<u8>,
}

impl FrontDoor {
    fn connect(place: &Path, server: &mut Child, taken: Taken) -> io::Result<Box<dyn Client>> {
        await_ready(server)?;
        let (bytes, loans) = if taken == Taken::Chunks { (0, 0) } else { (1 << 30, 256) };
        let client = shmferry::Client::builder()
            .segments(1)
            .segment_len(SEGMENT)
            .slots(4)
            .keep_loans(bytes, loans)
            .connect(place.join("queue").as_path())?;
        Ok(Box::new(FrontDoor { client, taken, buffer: vec![0; BUFFER] }))
    }
}

impl Client for FrontDoor {
    fn fetch(&mut self, file: usize, sink: Sink<'_>) -> io::Result<()> {
        let mut body = self.client.get([file as u8])?;
        assert!(body.is_lent() || !matches!(self.taken, Taken::Slice | Taken::Read));
        match self.taken {
            Taken::Slice | Taken::SliceOnce if body.is_lent() => {
                sink(Bytes::Private(&body.into_bytes()?));
            }
            Taken::Read => loop {
                match body.read(&mut self.buffer)? {
                    0 => break,
                    len => sink(Bytes::Private(&self.buffer[..len])),
                }
            },
            _ => {
                while let Some(chunk) = body.next_chunk(Deadline::NEVER)? {
                    sink(Bytes::Shared(chunk.bytes()));
                }
            }
        }
        Ok(())
    }

    fn hand_over(&mut self, file: usize) -> io::Result<bool> {
        match self.taken {
            Taken::Slice => _ = black_box(&self.client.get([file as u8])?.into_bytes()?[..]),
            // Readable by `pread` from here on.
            Taken::Read => _ = black_box(self.client.get([file as u8])?),
            Taken::Chunks | Taken::SliceOnce => return Ok(false),
        }
        Ok(true)
    }
}
