//! Several hosts on loopback addresses, an origin, and HAProxy or nginx in front of them, with the
//! configuration files and the commands that `docs/hosts.md` shows.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use shmferry_test_support::{
    Answer, Client, LARGE, Place, Program, Signal, WATCHDOG, noise, wait_until,
};

/// The hosts' names, as HAProxy's file has them.
pub const HOSTS: [&str; 3] = ["one", "two", "three"];

/// Who answers what no cache has.
pub const ORIGIN: &str = "origin";

/// Paths that the hosts' caches and the origin have, each with contents of its own.
pub const CACHED: usize = 300;

/// Paths that the origin alone has.
pub const FRESH: usize = 30;

/// A large file that the hosts alone have.
pub const LARGE_PATH: &str = "/large";

/// Which host answers each path.
pub type Holders = BTreeMap<String, String>;

/// Whether one of these programs is missing; says which.
pub fn lacks(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|name| installed(name).is_none()).collect();
    missing.iter().for_each(|name| eprintln!("left out: no {name} is installed"));
    !missing.is_empty()
}

/// The paths of [`CACHED`] files.
pub fn cached() -> impl Iterator<Item = String> {
    (0..CACHED).map(|n| format!("/cached/{n}"))
}

/// The paths of [`FRESH`] files.
pub fn fresh() -> impl Iterator<Item = String> {
    (0..FRESH).map(|n| format!("/fresh/{n}"))
}

/// The contents of a path at one holder: its name, then bytes that belong to this path.
fn body(path: &str, holder: &str) -> Vec<u8> {
    let number: usize = path.rsplit('/').next().unwrap().parse().unwrap_or_default();
    let len = if path == LARGE_PATH {
        LARGE
    } else if number % 10 == 9 {
        100_000 + number
    } else {
        number * 17
    };
    let mut body = format!("{holder} has {path}\n").into_bytes();
    body.extend(noise(number + usize::from(path.starts_with("/fresh")) * CACHED, len));
    body
}

/// Who an answer is from, if all of it is as that one has it. Panics at any wrong byte.
#[track_caller]
pub fn holder(path: &str, answer: &Answer) -> String {
    let Answer::Ok(found) = answer else { panic!("{path}: {answer:?}") };
    let mut names = HOSTS.into_iter().chain([ORIGIN]);
    let name = names.find(|name| found.starts_with(format!("{name} has ").as_bytes()));
    let name = name.unwrap_or_else(|| panic!("{path} is from nobody: {answer:?}"));
    assert!(*found == body(path, name), "{path} from {name} is not as it should be: {answer:?}");
    name.to_owned()
}

/// Whether an answer broke off, and what came of it is right.
pub fn is_cut(path: &str, answer: &Answer) -> bool {
    let of = |name: &&str| {
        let whole = body(path, name);
        matches!(answer, Answer::Short { announced, received }
            if *announced == whole.len() as u64 && whole.starts_with(received))
    };
    *answer == Answer::Nothing || HOSTS.iter().chain([&ORIGIN]).any(of)
}

// ---------------------------------------------------------------- what both have

/// An HTTP origin: nginx, so that it can be killed.
pub struct Origin {
    place: Place,
    pub address: SocketAddr,
    server: Option<Program>,
}

impl Origin {
    pub fn start() -> Origin {
        let place = Place::new();
        for path in cached().chain(fresh()) {
            place.write(&format!("files{path}"), body(&path, ORIGIN));
        }
        let mut origin = Origin { place, address: free_address(), server: None };
        origin.resume();
        origin
    }

    /// Starts it, at its address.
    pub fn resume(&mut self) {
        let Origin { place, address, .. } = self;
        let server = format!("server {{ listen {address}; root files; }}");
        self.server = Some(nginx(place, &server, *address));
    }

    pub fn kill(&mut self) {
        self.server.take().expect("it runs").kill();
    }

    pub fn wind_up(self) {
        self.server.expect("it runs").terminate();
        self.place.assert_nothing_left();
    }
}

/// Writes what a host has by itself.
fn fill(place: &Place, name: &str) {
    for path in cached().chain([LARGE_PATH.to_owned()]) {
        place.write(&format!("files{path}"), body(&path, name));
    }
    place.write("files/health", "well\n");
}

/// A file of `docs`, with these replaced, and no address of the document's network left.
fn of_docs(file: &str, replaced: &[(&str, String)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(file);
    let mut text = fs::read_to_string(path).unwrap();
    for (from, to) in replaced {
        assert!(text.contains(from), "docs/{file} has no {from:?}");
        text = text.replace(from, to);
    }
    text
}

/// As [`of_docs`], for a whole file that a program reads.
fn configuration(file: &str, replaced: &[(&str, String)]) -> String {
    let text = of_docs(file, replaced);
    assert!(!text.contains("10.0.0."), "an address was not replaced:\n{text}");
    text
}

/// A configuration without the lines that list a host, of which there are `count`.
fn without_lines(configuration: &str, host: &SocketAddr, count: usize) -> String {
    let host = host.to_string();
    let (left, rest): (Vec<_>, Vec<_>) =
        configuration.lines().partition(|line| line.split_whitespace().all(|word| word != host));
    assert_eq!(rest.len(), count, "lines that list {host} in:\n{configuration}");
    left.join("\n") + "\n"
}

/// An address of this machine that no other test uses, so that what was killed there can come back.
fn new_ip() -> IpAddr {
    static TAKEN: AtomicU8 = AtomicU8::new(1);
    let taken = TAKEN.fetch_add(1, Ordering::Relaxed);
    let [low, high, ..] = std::process::id().to_le_bytes();
    Ipv4Addr::new(127, high.max(1), low, taken).into()
}

/// A free port of a [`new_ip`].
fn free_address() -> SocketAddr {
    TcpListener::bind((new_ip(), 0)).unwrap().local_addr().unwrap()
}

/// Where a program of the system is.
fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let mut dirs = std::env::split_paths(&path).chain(sbin);
    dirs.find_map(|dir| Some(dir.join(name)).filter(|program| program.is_file()))
}

/// A program of the system, to be run in a place.
fn system_command(place: &Place, name: &str) -> Command {
    let mut command = Command::new(installed(name).expect("it was looked for"));
    command.current_dir(place.path("")).env_clear();
    command
}

/// Runs nginx as one process, with these servers, until it takes connections.
fn nginx(place: &Place, servers: &str, address: SocketAddr) -> Program {
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let temporary = kinds.map(|kind| format!("{kind}_temp_path scratch/{kind};\n")).concat();
    let file = place.write(
        "nginx.conf",
        format!(
            "daemon off;\nmaster_process off;\npid scratch/pid;\nevents {{}}\n\
             http {{\naccess_log off;\n{temporary}{servers}\n}}\n"
        ),
    );
    place.write("scratch/empty", "");
    let mut command = system_command(place, "nginx");
    command.args(["-e", "stderr", "-p"]).arg(place.path("")).arg("-c").arg(file);
    let program = Program::spawn(&mut command);
    wait_until("nginx took connections", || {
        assert!(program.is_running(), "{}", program.stderr());
        TcpStream::connect(address).is_ok()
    });
    program
}

// ---------------------------------------------------------------- HAProxy, webproxy, simplecached

/// One of the hosts: `webproxy` and `simplecached`.
pub struct Host {
    place: Place,
    address: SocketAddr,
    origin: SocketAddr,
    cache: Option<Program>,
    proxy: Option<Program>,
}

impl Host {
    fn start(name: &str, origin: SocketAddr) -> Host {
        let place = Place::new();
        fill(&place, name);
        let mut host =
            Host { place, address: SocketAddr::new(new_ip(), 0), origin, cache: None, proxy: None };
        host.resume_cache();
        host.resume_proxy();
        host.address = host.proxy().address();
        host
    }

    pub fn resume_cache(&mut self) {
        let files = self.place.path("files").display().to_string();
        self.cache = Some(self.documented("simplecached", &[("/srv/files", files)]).listening());
    }

    /// At the same address as before.
    pub fn resume_proxy(&mut self) {
        let replaced = [
            ("10.0.0.11", self.address.ip().to_string()),
            ("-p 25362", format!("-p {}", self.address.port())),
            ("10.0.0.20:80", self.origin.to_string()),
        ];
        self.proxy = Some(self.documented("webproxy", &replaced).listening());
    }

    pub fn kill_cache(&mut self) {
        self.cache.take().expect("it runs").kill();
    }

    pub fn kill_proxy(&mut self) {
        self.proxy.take().expect("it runs").kill();
    }

    pub fn proxy(&self) -> &Program {
        self.proxy.as_ref().expect("it runs")
    }

    /// Runs the command that `docs/hosts.md` shows for this program.
    fn documented(&self, program: &str, replaced: &[(&str, String)]) -> Program {
        let text = of_docs("hosts.md", &[]);
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(program));
        let mut args = lines.next().expect("docs/hosts.md shows the command").to_owned();
        let cache = ("unix:/run/shmferry/cache.sock", self.place.cache_address());
        for (from, to) in replaced.iter().chain([&cache]) {
            assert!(args.contains(from), "docs/hosts.md: {program}{args} has no {from:?}");
            args = args.replace(from, to);
        }
        self.place.run(program, args.split_whitespace())
    }
}

/// Three hosts behind HAProxy.
pub struct Cluster {
    pub origin: Origin,
    pub hosts: [Host; 3],
    pub front: Front,
    place: Place,
    haproxy: Program,
}

/// Where HAProxy listens.
#[derive(Clone, Copy)]
pub struct Front(SocketAddr);

impl Front {
    pub fn connect(self) -> Client {
        Client::to(self.0)
    }

    pub fn get(self, path: &str) -> Answer {
        let mut client = self.connect();
        client.request(path);
        client.answer()
    }

    /// Who holds each of [`cached`].
    #[track_caller]
    pub fn holders(self) -> Holders {
        holders(|path| self.get(path))
    }
}

impl Cluster {
    /// Starts all of it, and waits until HAProxy has seen every host well.
    pub fn start() -> Cluster {
        let origin = Origin::start();
        let hosts = HOSTS.map(|name| Host::start(name, origin.address));
        let place = Place::new();
        let replaced = Cluster::replaced(&hosts);
        let (front, haproxy) = haproxy(&place, configuration("hosts/haproxy.cfg", &replaced));
        let cluster = Cluster { origin, hosts, front, place, haproxy };
        for host in 0..HOSTS.len() {
            cluster.wait_until_has("hosts", host, "UP L7OK");
            cluster.wait_until_has("proxies", host, "UP L7OK");
        }
        cluster
    }

    fn replaced(hosts: &[Host; 3]) -> [(&'static str, String); 3] {
        [
            ("10.0.0.11:25362", hosts[0].address.to_string()),
            ("10.0.0.12:25362", hosts[1].address.to_string()),
            ("10.0.0.13:25362", hosts[2].address.to_string()),
        ]
    }

    /// Who holds what for another HAProxy, whose file lists one host less.
    pub fn holders_without(&self, host: usize) -> Holders {
        let place = Place::new();
        let text = configuration("hosts/haproxy.cfg", &Cluster::replaced(&self.hosts));
        let text = without_lines(&text, &self.hosts[host].address, 2);
        let (front, haproxy) = haproxy(&place, text);
        let holders = front.holders();
        end_haproxy(haproxy, &place);
        holders
    }

    /// Waits until HAProxy has a host down, in a backend.
    pub fn wait_until_down(&self, backend: &str, host: usize) {
        self.wait_until_has(backend, host, "DOWN");
    }

    /// Waits until HAProxy has a host up, in both backends.
    pub fn wait_until_up(&self, host: usize) {
        self.wait_until_has("hosts", host, "UP L7OK");
        self.wait_until_has("proxies", host, "UP L7OK");
    }

    /// What HAProxy has of a host: its state, and what its last check came to.
    pub fn state(&self, backend: &str, host: usize) -> String {
        let mut socket = UnixStream::connect(self.place.path("haproxy/admin.sock")).unwrap();
        socket.set_read_timeout(Some(WATCHDOG)).unwrap();
        socket.write_all(b"show stat\n").unwrap();
        let mut table = String::new();
        socket.read_to_string(&mut table).unwrap();
        let mut lines = table.lines();
        let names: Vec<_> = lines.next().unwrap().split(',').collect();
        let start = format!("{backend},{},", HOSTS[host]);
        let line = lines.find(|line| line.starts_with(&start)).expect("HAProxy knows the host");
        let value = |name| {
            let column = names.iter().position(|it| *it == name).expect("HAProxy has this column");
            line.split(',').nth(column).unwrap()
        };
        format!("{} {}", value("status"), value("check_status"))
    }

    fn wait_until_has(&self, backend: &str, host: usize, state: &str) {
        wait_until(&format!("{} in {backend} was {state}", HOSTS[host]), || {
            // While it is on its way to another state, a fraction stands between: `UP 1/2 L7STS`.
            self.state(backend, host).starts_with(state)
        });
    }

    /// Ends all of it in order. Returns what each `webproxy` counted, under a name.
    pub fn wind_up<const N: usize>(self, counts: [&str; N]) -> [[u64; N]; 3] {
        end_haproxy(self.haproxy, &self.place);
        let counted = self.hosts.map(|host| {
            let [proxy, _] = host.place.wind_up([host.proxy.unwrap(), host.cache.unwrap()]);
            counts.map(|name| proxy.count(name))
        });
        self.origin.wind_up();
        counted
    }
}

/// Runs HAProxy with this configuration, at an address of its own, until it takes connections.
fn haproxy(place: &Place, mut configuration: String) -> (Front, Program) {
    let address = free_address();
    let socket = place.path("haproxy/admin.sock").display().to_string();
    for (from, to) in
        [("bind :25362", format!("bind {address}")), ("/run/haproxy/admin.sock", socket)]
    {
        assert!(configuration.contains(from), "docs/hosts/haproxy.cfg has no {from:?}");
        configuration = configuration.replace(from, &to);
    }
    place.write("haproxy/empty", "");
    let file = place.write("haproxy.cfg", configuration);
    let mut command = system_command(place, "haproxy");
    let program = Program::spawn(command.arg("-db").arg("-f").arg(file));
    wait_until("HAProxy took connections", || {
        assert!(program.is_running(), "{}", program.stderr());
        let socket = UnixStream::connect(place.path("haproxy/admin.sock"));
        socket.is_ok() && TcpStream::connect(address).is_ok()
    });
    (Front(address), program)
}

fn end_haproxy(program: Program, place: &Place) {
    program.signal(Signal::TERM);
    program.finish(); // HAProxy reports the signal as its exit code
    place.assert_nothing_left();
}

// ---------------------------------------------------------------- nginx

/// Three hosts that speak HTTP, behind nginx. nginx plays the hosts, too: files, and for what is
/// missing the origin.
pub struct WebCluster {
    pub origin: Origin,
    hosts: [WebHost; 3],
    place: Place,
    address: SocketAddr,
    front: Program,
}

struct WebHost {
    place: Place,
    address: SocketAddr,
    server: Option<Program>,
}

impl WebCluster {
    pub fn start() -> WebCluster {
        let origin = Origin::start();
        let hosts = HOSTS.map(|name| {
            let place = Place::new();
            fill(&place, name);
            let mut host = WebHost { place, address: free_address(), server: None };
            host.resume(origin.address);
            host
        });
        let place = Place::new();
        let address = free_address();
        let front = nginx(&place, &WebCluster::configuration(&hosts, address), address);
        WebCluster { origin, hosts, place, address, front }
    }

    fn configuration(hosts: &[WebHost; 3], address: SocketAddr) -> String {
        let replaced = [
            ("listen 8000;", format!("listen {address};")),
            ("10.0.0.11:8080", hosts[0].address.to_string()),
            ("10.0.0.12:8080", hosts[1].address.to_string()),
            ("10.0.0.13:8080", hosts[2].address.to_string()),
        ];
        configuration("hosts/nginx.conf", &replaced)
    }

    /// Who holds what for another nginx, whose file lists one host less.
    pub fn holders_without(&self, host: usize) -> Holders {
        let place = Place::new();
        let address = free_address();
        let text = WebCluster::configuration(&self.hosts, address);
        let text = without_lines(&text, &self.hosts[host].address, 1);
        let front = nginx(&place, &text, address);
        let holders = holders(|path| web_get(address, path));
        front.terminate();
        place.assert_nothing_left();
        holders
    }

    /// Asks by HTTP, and puts the answer in GETFILE's terms: 200, 404, 502, or none of these.
    pub fn get(&self, path: &str) -> Answer {
        web_get(self.address, path)
    }

    /// A client that has asked, and reads nothing yet.
    pub fn connect(&self, path: &str) -> Client {
        web_connect(self.address, path)
    }

    #[track_caller]
    pub fn holders(&self) -> Holders {
        holders(|path| self.get(path))
    }

    pub fn kill_host(&mut self, host: usize) {
        self.hosts[host].server.take().expect("it runs").kill();
    }

    pub fn resume_host(&mut self, host: usize) {
        self.hosts[host].resume(self.origin.address);
    }

    pub fn wind_up(self) {
        self.front.terminate();
        self.place.assert_nothing_left();
        for host in self.hosts {
            host.server.expect("it runs").terminate();
            host.place.assert_nothing_left();
        }
        self.origin.wind_up();
    }
}

impl WebHost {
    fn resume(&mut self, origin: SocketAddr) {
        let server = format!(
            "server {{\nlisten {};\nroot files;\nlocation / {{ try_files $uri @origin; }}\n\
             location @origin {{ proxy_pass http://{origin}; }}\n}}",
            self.address
        );
        self.server = Some(nginx(&self.place, &server, self.address));
    }
}

fn web_get(address: SocketAddr, path: &str) -> Answer {
    web_answer(&web_connect(address, path).read_all())
}

fn web_connect(address: SocketAddr, path: &str) -> Client {
    let mut client = Client::to(address);
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    client
}

/// What came by HTTP, in GETFILE's terms.
pub fn web_answer(bytes: &[u8]) -> Answer {
    let parsed = || {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = str::from_utf8(&bytes[..end]).ok()?.to_ascii_lowercase();
        let received = bytes[end + 4..].to_vec();
        let announced = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        let announced: u64 = announced.parse().ok()?;
        match head.split(' ').nth(1)? {
            "200" if received.len() as u64 == announced => Some(Answer::Ok(received)),
            "200" if (received.len() as u64) < announced => {
                Some(Answer::Short { announced, received })
            }
            "404" => Some(Answer::NotFound),
            "502" => Some(Answer::Error),
            _ => None,
        }
    };
    match bytes {
        b"" => Answer::Nothing,
        _ => parsed().unwrap_or_else(|| Answer::Nonsense(bytes.to_vec())),
    }
}

/// Who holds each of [`cached`].
#[track_caller]
fn holders(get: impl Fn(&str) -> Answer) -> Holders {
    let mut holders = Holders::new();
    for path in cached() {
        let name = holder(&path, &get(&path));
        holders.insert(path, name);
    }
    holders
}
