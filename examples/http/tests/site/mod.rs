//! A cache and a web server as processes, and `curl` to ask them.

#![allow(dead_code)] // no test uses all of it

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};

use shmferry_test_support::{Exit, Place, Program, wait_until};

/// The segments at rest, among the metrics.
pub const IDLE: &str = "shmferry_http_segments{state=\"idle\"}";

/// A web server and its cache, which serves the directory `files`.
pub struct Site {
    pub place: Place,
    /// Unless it was taken away.
    pub cache: Option<Program>,
    pub web: Program,
    pub address: SocketAddr,
}

impl Site {
    /// With these files.
    pub fn new(files: &[(&str, &[u8])]) -> Site {
        Site::with(&[], files)
    }

    /// With these arguments for the web server.
    pub fn with(args: &[&str], files: &[(&str, &[u8])]) -> Site {
        let place = Place::new();
        place.write("files/made", b""); // makes the directory
        for (name, bytes) in files {
            place.write(&format!("files/{name}"), bytes);
        }
        Site::over(place, "files", args)
    }

    /// In a place where there is something to serve.
    pub fn over(place: Place, served: &str, args: &[&str]) -> Site {
        let cache = Some(place.simplecached(["-c", served]).listening());
        let web = run_web(&place, "127.0.0.1:0", args).listening();
        let address = web.address();
        Site { place, cache, web, address }
    }

    /// Adds a file of zeros.
    pub fn add_hole(&self, name: &str, len: u64) {
        let path = self.place.write(&format!("files/{name}"), b"");
        std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
    }

    pub fn take_cache(&mut self) -> Program {
        self.cache.take().unwrap()
    }

    pub fn restart_cache(&mut self) {
        self.cache = Some(self.place.simplecached(["-c", "files"]).listening());
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What `curl` gets.
    pub fn curl(&self, path: &str, args: &[&str]) -> Answer {
        Answer::parse(&curl(&self.url(path), args))
    }

    /// What a connection of its own gets.
    pub fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path} HTTP/1.0\r\n\r\n"))
    }

    /// What these bytes get, up to the connection's end.
    pub fn ask(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes)
    }

    /// The tag of a file, once it has one: new files have none.
    pub fn tag(&self, path: &str) -> String {
        let mut tag = None;
        wait_until("the file had a tag", || {
            tag = self.get(path).header("etag");
            tag.is_some()
        });
        tag.unwrap()
    }

    /// A number from the metrics.
    pub fn metric(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.get("/metrics").body).unwrap();
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        values.next().unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse().unwrap()
    }

    /// Ends both, and asserts that nothing is left; what each said.
    pub fn end(self) -> [Exit; 2] {
        let Site { place, cache, web, .. } = self;
        place.wind_up([web, cache.unwrap()])
    }
}

pub fn run_web(place: &Place, listen: &str, args: &[&str]) -> Program {
    let (cache, mut all) = (place.cache_address(), vec!["--listen", listen, "--cache"]);
    all.push(&cache);
    all.extend(args);
    place.run("shmferry-http", all)
}

/// Whether a program is installed; says so if not.
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = std::env::split_paths(&path).any(|it| it.join(program).exists());
    if !has {
        eprintln!("skipped: there is no {program}");
    }
    has
}

/// `curl` under way.
pub fn start_curl(url: &str, args: &[&str]) -> std::process::Child {
    let fixed = ["-sS", "-i", "--path-as-is", "--max-time", "120"];
    let mut command = Command::new("curl");
    command.args(fixed).args(args).arg(url).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Heads and body, as they came.
pub fn curl(url: &str, args: &[&str]) -> Vec<u8> {
    let Output { status, stdout, stderr } = start_curl(url, args).wait_with_output().unwrap();
    assert!(status.success(), "{url} {args:?}: {}", String::from_utf8_lossy(&stderr));
    stdout
}

/// An answer, taken apart.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    #[track_caller]
    pub fn parse(bytes: &[u8]) -> Answer {
        let end = bytes.windows(4).position(|it| it == b"\r\n\r\n").expect("a head with an end");
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).expect("a status");
        Answer { status, head, body: bytes[end + 4..].to_vec() }
    }

    pub fn header(&self, name: &str) -> Option<String> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    }

    /// Asserts a status, and a body that is as long as announced.
    #[track_caller]
    pub fn assert(&self, status: u16, body: &[u8]) {
        assert_eq!(self.status, status, "{}", self.head);
        assert!(self.body == body, "{}: {} bytes of {}", self.head, self.body.len(), body.len());
        if let Some(len) = self.header("content-length") {
            assert_eq!(len, body.len().to_string());
        }
        assert_eq!(self.header("x-content-type-options").as_deref(), Some("nosniff"));
    }

    #[track_caller]
    pub fn assert_status(&self, status: u16) {
        assert_eq!(self.status, status, "{}", self.head);
    }
}
