//! With the feature `tracing`, errors of servers are events: of clients that leave at debug, of
//! everything else at warn.
#![cfg(feature = "tracing")]

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use shmferry::channel::InProcess;
use shmferry::{Client, Server};
use shmferry_test_support::watchdog::watchdog;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Notes events.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<(Level, String)>>>);

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, _: &Field, value: &dyn Debug) {
        write!(self.0, "{value:?}").unwrap();
    }
}

impl Subscriber for Notes {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push((*event.metadata().level(), message.0));
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn errors_of_handlers_are_events() {
    let _watchdog = watchdog();
    let notes = Notes::default();
    tracing::subscriber::set_global_default(notes.clone()).unwrap();
    let queue = InProcess::bounded(2);
    let serving = Server::with(queue.clone()).serve(1, |request| match request.key() {
        b"fails" => Err("no disk".into()),
        _ => request
            .send_bytes(&[1; 100_000])
            .map_err(Box::<dyn std::error::Error + Send + Sync>::from),
    });
    let serving = serving.unwrap();
    let client = Client::builder().segments(1).segment_len(1024).in_process(&queue).unwrap();
    assert!(client.get("fails").is_err());
    drop(client.get("leaves").unwrap());
    serving.stop();
    serving.wait();
    let noted = notes.0.lock().unwrap();
    let expected = [
        (Level::WARN, "serving fails failed: no disk"),
        (Level::DEBUG, "serving leaves failed: the receiver cancelled the transfer"),
    ];
    let noted: Vec<_> = noted.iter().map(|(level, text)| (*level, text.as_str())).collect();
    assert_eq!(noted, expected);
}
