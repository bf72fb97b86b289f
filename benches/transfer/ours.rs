//! This crate's own ways: both transports, several numbers of slots, and within one process.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use shmferry::Deadline;
use shmferry::channel::{InProcess, Named, PosixMq, RequestQueue, Requester, Seqpacket};
use shmferry::protocol::Reply;
use shmferry::segment::{Backing, Memfd, SegmentPool};

use super::{BUFFER, Bytes, Client, Method, Sink, TIMEOUT, await_ready, files_beside, say_ready};

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
