//! Any bytes as a message of the socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shmferry::fuzzing::request(bytes));
