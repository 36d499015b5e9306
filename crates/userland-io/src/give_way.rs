//! Lets other tasks run, under any executor.

use std::future::poll_fn;
use std::task::Poll;

/// Ends the task's turn, and asks for another.
pub(crate) async fn give_way() {
    let mut given = false;
    poll_fn(|cx| match std::mem::replace(&mut given, true) {
        true => Poll::Ready(()),
        false => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}
