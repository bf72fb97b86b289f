//! A client of the proxy: what it asks for, how it behaves, and what came of that.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::chance::Dice;
use super::files::{Candidate, FileId, Files};
use super::getfile::{Dialect, MAX_REPLY_HEADER_LEN, ParsedReply, Reply, parse_reply};

/// Well above all time-outs of the programs, and the longest stop, together. Longer is a hang.
pub const WATCHDOG: Duration = Duration::from_secs(60);

/// How an exchange ended.
pub enum Ending {
    /// All bytes, each as it should be.
    Whole,
    /// Fewer than announced, each as it should be.
    Short,
    Error,
    Miss,
    Invalid,
    /// Nothing at all.
    Nothing,
    /// Nobody listens.
    Refused,
    /// The client left.
    Left,
    /// Nothing came for the whole of the [`WATCHDOG`].
    Hang(String),
    /// A reply or a body that may not be.
    Wrong(String),
}

/// What a client is about to do.
pub enum Plan {
    Fetch(FileId),
    Absent(u64),
    Malformed(&'static str),
    /// Reads this much, and leaves: by a reset, or not.
    Cancel {
        file: FileId,
        after: u64,
        resets: bool,
    },
    /// Reads this much at a time, with a pause after each, for so many times.
    Dawdle {
        file: FileId,
        step: u64,
        pause: Duration,
        times: u64,
    },
    /// Reads at this rate, in bytes a second, for so long, and then what is left at once.
    Steady {
        file: FileId,
        rate: u32,
        span: Duration,
    },
    /// Asks, and says at once that no more will come.
    HalfClosed(FileId),
    /// Sends so much of a request; then leaves, or waits for what comes.
    Unfinished {
        len: usize,
        leaves: bool,
    },
}

const MALFORMED: [&str; 6] = [
    "PULLFILE GET /f1\r\n\r\n",
    "GETFILE PUT /f1\r\n\r\n",
    "GETFILE GET f1\r\n\r\n",
    "GETFILE GET /f1 /f2\r\n\r\n",
    "GETFILE GET /f1\r\r\n\n",
    "\r\n\r\n",
];

impl Plan {
    /// As the dice have it.
    pub fn draw(dice: &mut Dice, files: &Files, timeout: Duration) -> Plan {
        match dice.roll(1000) {
            0..400 => Plan::Fetch(files.small(dice)),
            400..550 => Plan::Fetch(files.large(dice)),
            550..680 => Plan::Fetch(files.shifting(dice)),
            680..760 => Plan::Absent(dice.roll(1000)),
            760..840 => Plan::Malformed(dice.pick(&MALFORMED)),
            840..930 => {
                let file = if dice.roll(2) == 0 { files.largest() } else { files.large(dice) };
                Plan::Cancel { file, after: dice.roll(300_000), resets: dice.roll(2) == 0 }
            }
            930..970 => {
                let pause = Duration::from_millis(1 + dice.roll(100));
                Plan::Dawdle {
                    file: files.large(dice),
                    step: 1 + dice.roll(100_000),
                    pause,
                    times: 10,
                }
            }
            // Longer than the proxy waits.
            970..975 => {
                let pause = timeout + Duration::from_millis(500);
                Plan::Dawdle {
                    file: files.largest(),
                    step: 1 + dice.roll(100_000),
                    pause,
                    times: 1,
                }
            }
            975..995 => Plan::Unfinished { len: dice.roll(16) as usize, leaves: true },
            _ => Plan::Unfinished { len: dice.roll(16) as usize, leaves: false },
        }
    }

    /// Whether only a fault could keep it from ending as it should.
    pub fn ends_well(&self, ending: &Ending, files: &Files) -> bool {
        match (self, ending) {
            (Plan::Fetch(file), Ending::Short) => files.is_shifting(*file),
            (Plan::Fetch(_) | Plan::HalfClosed(_) | Plan::Steady { .. }, ending) => {
                matches!(ending, Ending::Whole)
            }
            (Plan::Absent(_), ending) => matches!(ending, Ending::Miss),
            (Plan::Malformed(_), ending) => matches!(ending, Ending::Invalid),
            (Plan::Cancel { .. }, ending) => matches!(ending, Ending::Left | Ending::Whole),
            (Plan::Dawdle { times: 1, .. }, ending) => {
                matches!(ending, Ending::Short | Ending::Whole)
            }
            (Plan::Dawdle { .. }, ending) => matches!(ending, Ending::Whole),
            (Plan::Unfinished { leaves, .. }, ending) => {
                matches!((leaves, ending), (true, Ending::Left) | (false, Ending::Invalid))
            }
        }
    }

    pub fn name(&self, files: &Files) -> String {
        match self {
            Plan::Fetch(file) => format!("fetch {}", files.key(*file)),
            Plan::Absent(_) => "ask for what is not there".to_owned(),
            Plan::Malformed(text) => format!("send {text:?}"),
            Plan::Cancel { file, after, resets } => {
                format!("leave {} after {after}, resets: {resets}", files.key(*file))
            }
            Plan::Dawdle { file, step, pause, .. } => {
                format!("dawdle over {}: {pause:?} after {step} bytes", files.key(*file))
            }
            Plan::Steady { file, rate, .. } => {
                format!("read {} steadily, {rate} bytes a second", files.key(*file))
            }
            Plan::HalfClosed(file) => format!("ask for {} and half-close", files.key(*file)),
            Plan::Unfinished { len, leaves } => {
                format!("send {len} bytes of a request, leaves: {leaves}")
            }
        }
    }

    /// Does it.
    pub fn carry_out(&self, address: SocketAddr, files: &Files) -> Ending {
        let since = Instant::now();
        let stream = match connect(address) {
            Ok(stream) => stream,
            Err(ending) => return ending,
        };
        let mut exchange = Exchange { stream, since, files };
        exchange.run(self).unwrap_or_else(|ending| ending)
    }
}

/// Asks for a file that stays as it is, and takes all of it.
pub fn probe(address: SocketAddr, files: &Files, file: FileId) -> Ending {
    Plan::Fetch(file).carry_out(address, files)
}

/// The proxy's address, of this run alone.
pub fn private_address() -> Ipv4Addr {
    let [_, high, mid, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 100 + high % 100, mid, low.clamp(1, 254))
}

fn connect(address: SocketAddr) -> Result<TcpStream, Ending> {
    let stream =
        TcpStream::connect_timeout(&address, WATCHDOG).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => Ending::Hang("in connecting".to_owned()),
            _ => Ending::Refused,
        })?;
    let prepared = stream
        .set_read_timeout(Some(WATCHDOG))
        .and_then(|()| stream.set_write_timeout(Some(WATCHDOG)));
    prepared.map_err(|_| Ending::Refused)?;
    Ok(stream)
}

struct Exchange<'f> {
    stream: TcpStream,
    since: Instant,
    files: &'f Files,
}

/// A body that is coming.
struct Body {
    announced: u64,
    received: u64,
    /// What it may still be.
    candidates: Vec<Candidate>,
}

impl Exchange<'_> {
    fn run(&mut self, plan: &Plan) -> Result<Ending, Ending> {
        match *plan {
            Plan::Fetch(file) => {
                self.request(&self.files.key(file));
                let mut body = self.body(Some(file))?;
                self.read_on(&mut body, u64::MAX)
            }
            Plan::Absent(number) => {
                self.request(&format!("/absent/{number}"));
                self.body(None).map(|_| Ending::Whole)
            }
            Plan::Malformed(text) => {
                self.send(text.as_bytes());
                self.body(None).map(|_| Ending::Whole)
            }
            Plan::Cancel { file, after, resets } => {
                self.request(&self.files.key(file));
                let mut body = self.body(Some(file))?;
                if let Ending::Short = self.read_on(&mut body, after)? {
                    return Ok(Ending::Short);
                }
                if resets {
                    // Fails only on what is no socket.
                    let _ =
                        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
                }
                Ok(Ending::Left)
            }
            Plan::Dawdle { file, step, pause, times } => {
                self.request(&self.files.key(file));
                let mut body = self.body(Some(file))?;
                for _ in 0..times {
                    let so_far = self.read_on(&mut body, step)?;
                    if !matches!(so_far, Ending::Left) {
                        return Ok(so_far);
                    }
                    thread::sleep(pause); // being slow is what it is here for
                }
                self.read_on(&mut body, u64::MAX)
            }
            Plan::Steady { file, rate, span } => {
                // Linux tells the sender of progress in steps of the receiver's window: with this
                // buffer and these rates about once a second at most. With a larger buffer the steps
                // are longer than the time-out; with a smaller one, loopback's segments of 64 KiB do
                // not fit, and are repeated after ever longer pauses.
                let small =
                    rustix::net::sockopt::set_socket_recv_buffer_size(&self.stream, 32 << 10);
                small.map_err(|_| Ending::Refused)?;
                self.request(&self.files.key(file));
                let mut body = self.body(Some(file))?;
                let start = Instant::now();
                while start.elapsed() < span {
                    // A step every 40 ms or so, and none is made up for.
                    let so_far = self.read_on(&mut body, u64::from(rate / 25))?;
                    if !matches!(so_far, Ending::Left) {
                        return Ok(so_far);
                    }
                    thread::sleep(Duration::from_millis(40));
                }
                // All that the proxy's system had taken in comes even when the proxy has given up:
                // only the end tells.
                self.read_on(&mut body, u64::MAX)
            }
            Plan::HalfClosed(file) => {
                self.request(&self.files.key(file));
                // Fails only where the server has hung up.
                let _ = self.stream.shutdown(Shutdown::Write);
                let mut body = self.body(Some(file))?;
                self.read_on(&mut body, u64::MAX)
            }
            Plan::Unfinished { len, leaves } => {
                self.send(&b"GETFILE GET /f1\r\n\r\n"[..len]);
                if leaves {
                    return Ok(Ending::Left);
                }
                self.body(None).map(|_| Ending::Whole)
            }
        }
    }

    fn request(&mut self, key: &str) {
        self.send(format!("GETFILE GET {key}\r\n\r\n").as_bytes());
    }

    /// To a server that may have gone already: what comes back tells.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Reads up to where the body begins; a reply without one is an ending. With no `file` asked for,
    /// there must be no body.
    fn body(&mut self, file: Option<FileId>) -> Result<Body, Ending> {
        let mut header = [0; MAX_REPLY_HEADER_LEN];
        let mut filled = 0;
        loop {
            // Byte by byte at its end: what follows is the body's.
            let read = self.read(&mut header[filled..filled + 1], || {
                format!("in the header, after {filled} bytes")
            })?;
            if read == 0 {
                // A program that was killed may have sent a part of its header.
                return Err(if filled == 0 { Ending::Nothing } else { Ending::Short });
            }
            filled += read;
            let wrong =
                |why: &str| Ending::Wrong(format!("{why}: {}", header[..filled].escape_ascii()));
            let reply = match parse_reply(&header[..filled], Dialect::Spec) {
                ParsedReply::Complete { reply, .. } => reply,
                ParsedReply::Incomplete => continue,
                ParsedReply::Invalid(_) => return Err(wrong("no reply")),
            };
            let announced = match (reply, file) {
                (Reply::Error, _) => return Err(Ending::Error),
                (Reply::FileNotFound, None) => return Err(Ending::Miss),
                (Reply::Invalid, None) => return Err(Ending::Invalid),
                (Reply::Ok { len }, Some(_)) => len,
                _ => return Err(wrong("the wrong reply")),
            };
            let candidates = file
                .map(|file| self.files.candidates(file, announced, self.since))
                .unwrap_or_default();
            if candidates.is_empty() {
                return Err(wrong("a length that the file has not had since it was asked for"));
            }
            return Ok(Body { announced, received: 0, candidates });
        }
    }

    /// Reads up to `most` bytes more: `Left` when there is more to come.
    fn read_on(&mut self, body: &mut Body, most: u64) -> Result<Ending, Ending> {
        let goal = body.received.saturating_add(most);
        let mut buffer = [0; 32 << 10];
        while body.received < goal {
            let room = (goal - body.received).min(buffer.len() as u64) as usize;
            let at = body.received;
            let read =
                self.read(&mut buffer[..room], || format!("in the body, after {at} bytes"))?;
            let bytes = &buffer[..read];
            if read == 0 {
                return Ok(if body.received == body.announced {
                    Ending::Whole
                } else {
                    Ending::Short
                });
            }
            body.candidates.retain(|candidate| candidate.has(at, bytes));
            if body.candidates.is_empty() {
                return Err(Ending::Wrong(format!(
                    "bytes {at}..{} of {}",
                    at + read as u64,
                    body.announced
                )));
            }
            body.received += read as u64;
        }
        Ok(Ending::Left)
    }

    /// Some bytes, or none at the end, a reset included.
    fn read(&mut self, into: &mut [u8], place: impl Fn() -> String) -> Result<usize, Ending> {
        loop {
            match self.stream.read(into) {
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    return Err(Ending::Hang(place()));
                }
                Err(_) => return Ok(0),
            }
        }
    }
}
