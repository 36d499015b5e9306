//! Where connections have no threads of their own, the runtime serves all of them.

use std::future::Future;
use std::io;

use super::socket::Stream;

/// None.
#[derive(Clone, Debug, Default)]
pub(super) struct Threads {}

/// Runs what `serve` makes of `stream`.
pub(super) async fn run<F>(
    stream: Stream,
    _: Threads,
    serve: impl FnOnce(Stream) -> F,
) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    serve(stream).await
}
