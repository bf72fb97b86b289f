//! What `simplecached`, `webproxy` and the tools for them share.

pub mod getfile;
pub mod program;
pub mod serve;
pub mod store;
