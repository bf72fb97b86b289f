//! `getfile`: downloads files over the GETFILE protocol, and measures servers that speak it.

mod bench;
mod download;

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    ops::Range,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use protocol::{Dialect, Malformed, MalformedReply, ParsedReply, Reply};
use shmferry_examples::program::signals_that_end;
use shmferry_tools::getfile as protocol;

/// Download files from a GETFILE server, or measure one.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct CommandLine {
    #[command(flatten)]
    download: download::Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Measure a server: requests and bytes a second, latency, failures
    Bench(bench::Options),
    /// Serve files for `bench --against-unix`
    #[command(hide = true)]
    ServeUnix(bench::ServeOptions),
}

fn main() -> ExitCode {
    let command_line = CommandLine::parse();
    let outcome = match &command_line.command {
        None => download::run(&command_line.download),
        Some(Command::Bench(options)) => bench::run(options),
        Some(Command::ServeUnix(options)) => bench::serve_unix(options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            complain(&message);
            ExitCode::FAILURE
        }
    }
}

/// Writes one line to standard error.
fn complain(message: &str) {
    // With standard error gone there is nobody left to tell; the exit code still says it.
    let _ = writeln!(io::stderr(), "getfile: {message}");
}

/// Where the server is and how it talks.
#[derive(Args)]
struct Connection {
    /// The server's name or address
    #[arg(short, long, value_name = "HOST", default_value = "localhost")]
    server: String,
    /// The server's port
    #[arg(short, long, default_value_t = 25362)]
    port: u16,
    /// How the server writes its replies
    #[arg(long, value_name = "spec|classic", default_value_t = Dialect::Spec)]
    dialect: Dialect,
    /// Give up after this long without progress
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    timeout: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => Err("must be more than zero".to_owned()),
        other => other.map_err(|error| error.to_string()),
    }
}

/// Asks one server for files, over one connection each.
struct Client<'a> {
    connection: &'a Connection,
    /// Instead of the connection's server and port.
    address: Address,
}

enum Address {
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

impl<'a> Client<'a> {
    /// Resolves the server's name, once for all requests.
    fn resolve(connection: &'a Connection) -> Result<Self, String> {
        let name = &connection.server;
        let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
        let addresses = (bare.unwrap_or(name), connection.port).to_socket_addrs();
        let addresses = addresses.map_err(|error| format!("cannot resolve {name}: {error}"))?;
        Ok(Self { connection, address: Address::Tcp(addresses.collect()) })
    }

    /// Requests `path` and reads as far as the header of the reply, by way of `buffer`.
    fn request<'b>(&self, path: &[u8], buffer: &'b mut [u8]) -> Result<Body<'b>, Failure> {
        assert!(buffer.len() >= protocol::MAX_REPLY_HEADER_LEN);
        let request = protocol::encode_request(path).map_err(Failure::Path)?;
        let mut stream = self.connect()?;
        match stream.write_all(&request) {
            Err(error) if is_hang_up(&error) => {} // it may have answered before it hung up
            sent => sent.map_err(|error| Failure::io("send the request", error))?,
        }
        let dialect = self.connection.dialect;
        let mut filled = 0;
        loop {
            let read = read_some(&mut stream, &mut buffer[filled..])
                .map_err(|error| Failure::io("read the reply", error))?;
            filled += read;
            match protocol::parse_reply(&buffer[..filled], dialect) {
                ParsedReply::Complete { reply, consumed } => {
                    let Reply::Ok { len } = reply else {
                        return Err(Failure::Refused(reply));
                    };
                    return Ok(Body { len, stream, buffer, early: consumed..filled });
                }
                ParsedReply::Invalid(why) => return Err(Failure::BadReply(dialect, why)),
                ParsedReply::Incomplete if read == 0 => return Err(Failure::NoReply(filled)),
                ParsedReply::Incomplete => {}
            }
        }
    }

    /// Connects to the first address that answers. The stream serves either family: nothing but
    /// `connect` depends on it.
    fn connect(&self) -> Result<TcpStream, Failure> {
        let timeout = self.connection.timeout;
        let mut refusals = Vec::new();
        let stream = match &self.address {
            Address::Unix(path) => UnixStream::connect(path)
                .map(|stream| TcpStream::from(OwnedFd::from(stream)))
                .map_err(|error| refusals.push(format!("{}: {error}", path.display())))
                .ok(),
            Address::Tcp(addresses) => addresses.iter().find_map(|address| {
                TcpStream::connect_timeout(address, timeout)
                    .map_err(|error| refusals.push(format!("{address}: {error}")))
                    .ok()
            }),
        };
        let stream = stream.ok_or_else(|| Failure::Connect(refusals.join("; ")))?;
        stream
            .set_read_timeout(Some(timeout))
            .and_then(|()| stream.set_write_timeout(Some(timeout)))
            .map_err(|error| Failure::io("set the timeout", error))?;
        Ok(stream)
    }
}

/// A file on its way from the server.
struct Body<'b> {
    /// Its length, as announced.
    len: u64,
    stream: TcpStream,
    buffer: &'b mut [u8],
    /// The part of `buffer` that came along with the header.
    early: Range<usize>,
}

impl Body<'_> {
    /// Hands the body to `sink`, and closes the connection at its announced length.
    ///
    /// The end of the stream is not waited for: some servers leave closing to the client. Bytes past
    /// the announced length are ignored, as curl ignores those past `Content-Length`.
    fn copy_to(
        mut self,
        mut sink: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<u64, Failure> {
        let announced = self.len;
        let mut received = 0;
        let mut fresh = self.early;
        loop {
            let missing = usize::try_from(announced - received).unwrap_or(usize::MAX);
            fresh.end = fresh.end.min(fresh.start.saturating_add(missing));
            received += fresh.len() as u64;
            sink(&self.buffer[fresh])?;
            if received == announced {
                return Ok(received);
            }
            fresh = 0..read_some(&mut self.stream, self.buffer).map_err(|error| {
                Failure::io(format!("read on after {received} of {announced} bytes"), error)
            })?;
            if fresh.is_empty() {
                return Err(Failure::Length { announced, received });
            }
        }
    }
}

/// Why a file did not arrive.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Path(Malformed),
    #[error("cannot connect to {0}")]
    Connect(String),
    #[error("{}", refusal(*.0))]
    Refused(Reply),
    #[error("bad reply for the {0} dialect: {1}")]
    BadReply(Dialect, MalformedReply),
    #[error("bad reply: the connection closed {0} bytes into the header")]
    NoReply(usize),
    #[error("the server announced {announced} bytes and sent {received}")]
    Length { announced: u64, received: u64 },
    #[error("timed out, with no progress in trying to {0}")]
    TimedOut(String),
    #[error("cannot {0}: {1}")]
    Io(String, io::Error),
}

impl Failure {
    fn io(attempt: impl Into<String>, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut(attempt.into()),
            _ => Self::Io(attempt.into(), error),
        }
    }
}

fn refusal(reply: Reply) -> &'static str {
    match reply {
        Reply::Ok { .. } => "no refusal at all",
        Reply::FileNotFound => "file not found",
        Reply::Error => "the server reports an error",
        Reply::Invalid => "the server calls the request invalid",
    }
}

/// Reads at least one byte, or none at the end of the stream. A reset is an end like any other:
/// a server that closes with part of the request unread causes one, and the length tells whether
/// anything is missing.
fn read_some(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_hang_up(&error) => return Ok(0),
            other => return other,
        }
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}
