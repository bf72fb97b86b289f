//! Requests in a ring, while the fuzzer writes to its memory between the steps of both ends.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| shmferry::fuzzing::ring(script));
