//! NBD servers side by side: ours, those of others, and the limit.

pub mod client;
pub mod crowd;
pub mod endpoint;
pub mod kinds;
pub mod limit;
pub mod report;
pub mod requests;
pub mod server;
pub mod targets;
pub mod tools;
