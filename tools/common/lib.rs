//! What the tools share.

pub mod getfile;
