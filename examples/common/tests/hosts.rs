//! Several hosts behind HAProxy or nginx, by the configuration files of `docs/hosts.md`: each path
//! has its host, and what fails costs no more than that document says.

#[path = "hosts/cluster.rs"]
mod cluster;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;

use cluster::{
    CACHED, Cluster, HOSTS, Holders, LARGE_PATH, ORIGIN, WebCluster, cached, fresh, holder, is_cut,
    lacks, web_answer,
};
use shmferry_test_support::{Answer, Dice, Signal, Stalled, wait_until};

// ---------------------------------------------------------------- HAProxy

#[test]
fn haproxy_sends_each_path_to_one_host_and_each_host_its_share() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let cluster = Cluster::start();
    let first = cluster.front.holders();
    assert_spread(&first);
    for _ in 0..2 {
        assert_moved_none(&first, &cluster.front.holders());
    }
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_moved_none(&first, &cluster.front.holders()));
        }
    });
    // What a request looks like on its way does not matter: its pieces, its end, what follows it.
    for path in cached().take(30) {
        let mut client = cluster.front.connect();
        for byte in format!("GETFILE GET {path}\r\n\r\n").into_bytes() {
            client.send([byte]);
        }
        client.half_close();
        assert_eq!(holder(&path, &client.answer()), first[&path]);
        let mut client = cluster.front.connect();
        client.send(format!("GETFILE GET {path} \r\n\r\nGETFILE GET /cached/0\r\n\r\n"));
        assert_eq!(holder(&path, &client.answer()), first[&path]);
    }
    assert_eq!(cluster.front.get("/absent"), Answer::NotFound);
    for malformed in ["GETFILE FETCH /cached/1\r\n\r\n", "GETFILE GET cached\r\n\r\n", "x\r\n\r\n"]
    {
        let mut client = cluster.front.connect();
        client.send(malformed);
        assert_eq!(client.answer(), Answer::Invalid, "{malformed}");
    }
    let mut client = cluster.front.connect();
    client.send("GETFILE GET /cached/1");
    client.half_close();
    assert_eq!(client.answer(), Answer::Invalid);

    // What the origin alone has goes by the same hash: one path, through one webproxy.
    const ASKED: u64 = 50;
    for _ in 0..ASKED {
        assert_eq!(holder("/fresh/0", &cluster.front.get("/fresh/0")), ORIGIN);
    }
    let counts = cluster.wind_up(["from_origin", "hits", "errors"]);
    let mut from_origin = counts.map(|[from_origin, ..]| from_origin);
    from_origin.sort();
    assert_eq!(from_origin, [0, 0, ASKED]);
    for (name, [_, hits, errors]) in HOSTS.into_iter().zip(counts) {
        let own = first.values().filter(|holder| *holder == name).count() as u64;
        assert!(hits >= own * 7, "{name} has {own} paths, asked for seven times, and {hits} hits");
        assert_eq!(errors, 0, "{name}");
    }
}

#[test]
fn haproxy_with_a_host_less_in_its_file_moves_only_that_hosts_paths() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let cluster = Cluster::start();
    let first = cluster.front.holders();
    assert_moved_only_those_of(0, &first, &cluster.holders_without(0));
    cluster.wind_up([]);
}

#[test]
fn haproxy_moves_only_the_paths_of_a_killed_host_and_gives_them_back() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let mut cluster = Cluster::start();
    let first = cluster.front.holders();
    let large = holder(LARGE_PATH, &cluster.front.get(LARGE_PATH));
    let victim = HOSTS.iter().position(|name| *name == large).unwrap();
    let (asked, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let is_dead = AtomicBool::new(false);
    let mut client = cluster.front.connect();
    client.request(LARGE_PATH);
    let under_way = Stalled::begin(client);

    // Under load: answers break off only while the victim dies. Once it is dead, a request meets a
    // refused connection, and is answered elsewhere, also before HAProxy has it down.
    let front = cluster.front;
    thread::scope(|scope| {
        let (asked, is_over, is_dead, first) = (&asked, &is_over, &is_dead, &first);
        let clients: Vec<_> = (0..4)
            .map(|client| {
                scope.spawn(move || {
                    let mut dice = Dice::new(client);
                    while !is_over.load(Relaxed) {
                        let path = format!("/cached/{}", dice.roll(CACHED));
                        let answer = loop {
                            let was_dead = is_dead.load(Relaxed);
                            let answer = front.get(&path);
                            if !is_cut(&path, &answer) {
                                break answer;
                            }
                            let is_excused = first[&path] == HOSTS[victim] && !was_dead;
                            assert!(is_excused, "{path}: {answer:?}");
                        };
                        let name = holder(&path, &answer);
                        let own = &first[&path];
                        assert!(name == *own || own == HOSTS[victim], "{path} moved to {name}");
                        asked.fetch_add(1, Relaxed);
                    }
                })
            })
            .collect();
        let wait_for_more = || {
            let enough = asked.load(Relaxed) + 200;
            wait_until("some more were asked", || {
                asked.load(Relaxed) >= enough || clients.iter().any(|it| it.is_finished())
            });
        };
        wait_for_more();
        cluster.hosts[victim].kill_proxy();
        is_dead.store(true, Relaxed);
        cluster.hosts[victim].kill_cache();
        cluster.wait_until_down("hosts", victim);
        wait_for_more();
        is_over.store(true, Relaxed);
    });
    let answer = under_way.resume();
    assert!(is_cut(LARGE_PATH, &answer), "{answer:?}");
    assert_moved_only_those_of(victim, &first, &cluster.front.holders());
    assert_ne!(holder(LARGE_PATH, &cluster.front.get(LARGE_PATH)), HOSTS[victim]);
    for path in fresh() {
        assert_eq!(holder(&path, &cluster.front.get(&path)), ORIGIN);
    }

    cluster.hosts[victim].resume_cache();
    cluster.hosts[victim].resume_proxy();
    cluster.wait_until_up(victim);
    assert_moved_none(&first, &cluster.front.holders());
    cluster.wind_up([]);
}

#[test]
fn haproxy_takes_a_host_that_hangs_out_until_it_goes_on() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let cluster = Cluster::start();
    let first = cluster.front.holders();
    cluster.hosts[1].proxy().signal(Signal::STOP);
    cluster.wait_until_down("hosts", 1);
    assert_moved_only_those_of(1, &first, &cluster.front.holders());
    cluster.hosts[1].proxy().signal(Signal::CONT);
    cluster.wait_until_up(1);
    assert_moved_none(&first, &cluster.front.holders());
    cluster.wind_up([]);
}

#[test]
fn haproxy_prefers_hosts_with_their_caches_and_without_any_the_origin_answers() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let mut cluster = Cluster::start();
    let first = cluster.front.holders();
    cluster.hosts[0].kill_cache();
    // Whether or not HAProxy has noticed: the host itself still answers, and so does everything.
    for path in cached() {
        assert_eq!(holder(&path, &cluster.hosts[0].proxy().get(&path)), ORIGIN);
    }
    cluster.front.holders();
    cluster.wait_until_down("hosts", 0);
    assert_moved_only_those_of(0, &first, &cluster.front.holders());
    assert!(cluster.state("proxies", 0).starts_with("UP"), "{}", cluster.state("proxies", 0));

    for host in 1..3 {
        cluster.hosts[host].kill_cache();
        cluster.front.holders();
        cluster.wait_until_down("hosts", host);
    }
    for (path, name) in cluster.front.holders() {
        assert_eq!(name, ORIGIN, "{path}");
    }
    assert_eq!(cluster.front.get("/absent"), Answer::NotFound);
    for host in 0..3 {
        cluster.hosts[host].resume_cache();
        cluster.wait_until_up(host);
    }
    assert_moved_none(&first, &cluster.front.holders());
    // Each had its part in what the origin answered without caches.
    let counts = cluster.wind_up(["from_origin", "errors"]);
    for (name, [from_origin, errors]) in HOSTS.into_iter().zip(counts) {
        assert!(from_origin as usize >= CACHED / 10, "{name}: {from_origin} from the origin");
        assert_eq!(errors, 0, "{name}");
    }
}

#[test]
fn haproxy_without_the_origin_answers_what_caches_have_and_refuses_the_rest() {
    if lacks(&["haproxy", "nginx"]) {
        return;
    }
    let mut cluster = Cluster::start();
    let first = cluster.front.holders();
    cluster.origin.kill();
    assert_moved_none(&first, &cluster.front.holders());
    for path in fresh().chain(["/absent".to_owned()]) {
        assert_eq!(cluster.front.get(&path), Answer::Error, "{path}");
    }
    assert_moved_none(&first, &cluster.front.holders());
    for host in 0..3 {
        cluster.hosts[host].kill_cache();
        cluster.wait_until_down("hosts", host);
    }
    for path in cached().take(30) {
        assert_eq!(cluster.front.get(&path), Answer::Error, "{path}");
    }
    for host in 0..3 {
        cluster.hosts[host].kill_proxy();
        cluster.wait_until_down("proxies", host);
    }
    assert_eq!(cluster.front.get("/cached/0"), Answer::Nothing);

    cluster.origin.resume();
    for host in 0..3 {
        cluster.hosts[host].resume_cache();
        cluster.hosts[host].resume_proxy();
        cluster.wait_until_up(host);
    }
    assert_moved_none(&first, &cluster.front.holders());
    for path in fresh() {
        assert_eq!(holder(&path, &cluster.front.get(&path)), ORIGIN);
    }
    cluster.wind_up([]);
}

// ---------------------------------------------------------------- nginx

#[test]
fn nginx_sends_each_path_to_one_host_and_each_host_its_share() {
    if lacks(&["nginx"]) {
        return;
    }
    let cluster = WebCluster::start();
    let first = cluster.holders();
    assert_spread(&first);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_moved_none(&first, &cluster.holders()));
        }
    });
    for path in cached().take(30) {
        let number = path.strip_prefix("/cached/").unwrap();
        for spelling in [format!("/c%61ched/{number}"), format!("/x/../cached/{number}?a={number}")]
        {
            assert_eq!(holder(&path, &cluster.get(&spelling)), first[&path], "{spelling}");
        }
    }
    for path in fresh() {
        assert_eq!(holder(&path, &cluster.get(&path)), ORIGIN);
    }
    assert_eq!(cluster.get("/absent"), Answer::NotFound);
    cluster.wind_up();
}

#[test]
fn nginx_with_a_host_less_in_its_file_moves_only_that_hosts_paths() {
    if lacks(&["nginx"]) {
        return;
    }
    let cluster = WebCluster::start();
    let first = cluster.holders();
    assert_moved_only_those_of(0, &first, &cluster.holders_without(0));
    cluster.wind_up();
}

#[test]
fn nginx_moves_only_the_paths_of_a_killed_host_and_gives_them_back() {
    if lacks(&["nginx"]) {
        return;
    }
    let mut cluster = WebCluster::start();
    let first = cluster.holders();
    let large = holder(LARGE_PATH, &cluster.get(LARGE_PATH));
    let victim = HOSTS.iter().position(|name| *name == large).unwrap();
    let mut under_way = cluster.connect(LARGE_PATH);
    let mut received = under_way.read_exactly(100);
    cluster.kill_host(victim);
    received.extend(under_way.read_all());
    let answer = web_answer(&received);
    assert!(is_cut(LARGE_PATH, &answer) && answer != Answer::Nothing, "{answer:?}");
    for _ in 0..3 {
        assert_moved_only_those_of(victim, &first, &cluster.holders());
    }
    cluster.resume_host(victim);
    wait_until("it had its paths again", || cluster.holders() == first);
    cluster.wind_up();
}

#[test]
fn nginx_without_the_origin_answers_what_caches_have_and_leaves_no_host_out() {
    if lacks(&["nginx"]) {
        return;
    }
    let mut cluster = WebCluster::start();
    let first = cluster.holders();
    cluster.origin.kill();
    for path in fresh().chain(["/absent".to_owned()]) {
        assert_eq!(cluster.get(&path), Answer::Error, "{path}");
    }
    assert_moved_none(&first, &cluster.holders());
    cluster.origin.resume();
    wait_until("the origin answered again", || cluster.get("/fresh/0") != Answer::Error);
    for path in fresh() {
        assert_eq!(holder(&path, &cluster.get(&path)), ORIGIN);
    }
    cluster.wind_up();
}

// ---------------------------------------------------------------- who holds what

/// Asserts that each host has a fair part, within wide bounds.
#[track_caller]
fn assert_spread(holders: &Holders) {
    for name in HOSTS {
        let own = holders.values().filter(|holder| *holder == name).count();
        assert!((CACHED / 6..=CACHED / 2).contains(&own), "{name} has {own} paths of {CACHED}");
    }
}

#[track_caller]
fn assert_moved_none(first: &Holders, now: &Holders) {
    let moved: Vec<_> = first.iter().filter(|(path, name)| now[*path] != **name).collect();
    assert!(moved.is_empty(), "{} paths moved, first {:?}", moved.len(), moved[0]);
}

/// Asserts that the paths of a host that is gone are now at both others, and no other path moved.
#[track_caller]
fn assert_moved_only_those_of(victim: usize, first: &Holders, now: &Holders) {
    for (index, name) in HOSTS.into_iter().enumerate() {
        let taken =
            first.keys().filter(|path| first[*path] == HOSTS[victim] && now[*path] == name).count();
        assert_eq!(taken > 0, index != victim, "{name} has {taken} of {}'s paths", HOSTS[victim]);
    }
    for (path, own) in first {
        let name = &now[path];
        assert!(name == own || own == HOSTS[victim], "{path} moved from {own} to {name}");
        assert_ne!(name, ORIGIN, "{path}");
    }
}
