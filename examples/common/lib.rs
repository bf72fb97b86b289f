//! What `simplecached`, `webproxy`, the web server and the tools for them share.

pub mod asked;
pub mod getfile;
pub mod program;
pub mod serve;
pub mod store;
