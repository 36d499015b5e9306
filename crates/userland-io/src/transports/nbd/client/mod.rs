//! The client: a remote export as an engine.
