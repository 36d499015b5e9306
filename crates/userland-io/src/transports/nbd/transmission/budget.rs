//! How many bytes of requests may be in flight, on a connection and on the whole server.
//!
//! A connection owns an [`ALLOWANCE`] that nobody can take from it, so that it
//! always gets on, whatever others do; beyond that it borrows from the server's
//! [`Budget`], and waits there in line if that is spent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::kits::Kits;

/// The bytes in flight that a connection has for itself.
pub(super) const ALLOWANCE: usize = 1 << 20;
/// The bytes that all connections of a server together may borrow beyond their allowances, and the working memory that
/// those to one export share.
#[derive(Clone, Debug)]
pub struct Budget {
    inner: Arc<Inner>,
    kits: Kits,
}

#[derive(Debug)]
struct Inner {
    permits: Arc<Semaphore>,
    total: u32,
    waiting: AtomicUsize,
}

impl Budget {
    /// Counted in pieces of this many bytes.
    pub const UNIT: usize = 4096;

    /// A budget of `bytes`, rounded up to whole units.
    pub fn new(bytes: usize) -> Self {
        let most = u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX);
        let total = units(bytes).min(most);
        Budget {
            inner: Arc::new(Inner {
                permits: Arc::new(Semaphore::new(total as usize)),
                total,
                waiting: AtomicUsize::new(0),
            }),
            kits: Kits::default(),
        }
    }

    /// The same budget, with another store of working memory.
    pub(crate) fn with_kits(self, kits: Kits) -> Self {
        Budget { kits, ..self }
    }

    /// The working memory that connections lend each other.
    pub(super) fn kits(&self) -> &Kits {
        &self.kits
    }

    /// True if some connection waits for bytes that others hold.
    pub(super) fn is_contended(&self) -> bool {
        self.inner.waiting.load(Ordering::Relaxed) > 0
    }
}

type Acquire = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// One connection's bytes in flight. Gives everything back when it is dropped.
pub(super) struct Account {
    budget: Budget,
    limit: usize,
    used: usize,
    borrowed: u32,
    acquire: Option<(u32, Acquire)>,
}

impl Account {
    /// An account that takes up to `limit` bytes, or one request if that is longer.
    pub(super) fn new(budget: Budget, limit: usize) -> Self {
        Account {
            budget,
            limit,
            used: 0,
            borrowed: 0,
            acquire: None,
        }
    }

    /// Takes `bytes`. Pending when the connection's own limit is reached, which its own
    /// replies end, or when the server's budget is spent, in which case `cx` is woken.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<()> {
        if self.used != 0 && self.used.saturating_add(bytes) > self.limit {
            return Poll::Pending;
        }
        let used = self.used.saturating_add(bytes);
        // More than there is can only be asked for by a request that no other one runs beside.
        let due = units(used.saturating_sub(ALLOWANCE)).min(self.budget.inner.total);
        if due > self.borrowed && self.poll_borrow(cx, due - self.borrowed).is_pending() {
            return Poll::Pending;
        }
        self.used = used;
        Poll::Ready(())
    }

    fn poll_borrow(&mut self, cx: &mut Context<'_>, missing: u32) -> Poll<()> {
        let inner = &self.budget.inner;
        let (asked, mut acquire) = match self.acquire.take() {
            Some(waiting) => waiting,
            None => {
                if let Ok(permit) = inner.permits.try_acquire_many(missing) {
                    permit.forget();
                    self.borrowed += missing;
                    return Poll::Ready(());
                }
                inner.waiting.fetch_add(1, Ordering::Relaxed);
                let acquire = inner.permits.clone().acquire_many_owned(missing);
                (missing, Box::pin(acquire) as Acquire)
            }
        };
        match acquire.as_mut().poll(cx) {
            Poll::Pending => {
                self.acquire = Some((asked, acquire));
                return Poll::Pending;
            }
            Poll::Ready(permit) => {
                inner.waiting.fetch_sub(1, Ordering::Relaxed);
                // The semaphore is never closed.
                if let Ok(permit) = permit {
                    permit.forget();
                    self.borrowed += asked;
                }
            }
        }
        // Replies that went out meanwhile changed what is missing.
        match asked < missing {
            true => self.poll_borrow(cx, missing - asked),
            false => Poll::Ready(()),
        }
    }

    /// Leaves the line for the server's bytes, and leaves those that have come to it meanwhile to others.
    pub(super) fn stop_waiting(&mut self) {
        if self.acquire.take().is_some() {
            self.budget.inner.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Gives `bytes` back.
    pub(super) fn give(&mut self, bytes: usize) {
        self.used = self.used.saturating_sub(bytes);
        let due = units(self.used.saturating_sub(ALLOWANCE));
        if due < self.borrowed {
            let surplus = self.borrowed - due;
            self.borrowed = due;
            self.budget.inner.permits.add_permits(surplus as usize);
        }
    }

    /// True if the connection holds bytes that another one waits for.
    pub(super) fn holds_up_others(&self) -> bool {
        self.borrowed > 0 && self.budget.is_contended()
    }

    /// True if everything taken has been given back.
    pub(super) fn is_settled(&self) -> bool {
        self.used == 0
    }

    /// True if some of the server's bytes are borrowed.
    pub(super) fn borrows(&self) -> bool {
        self.borrowed > 0
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.stop_waiting();
        let permits = &self.budget.inner.permits;
        permits.add_permits(self.borrowed as usize);
    }
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Account({} of {} bytes)", self.used, self.limit)
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(Budget::UNIT)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    const MIB: usize = 1 << 20;

    fn take(account: &mut Account, bytes: usize) -> bool {
        account
            .poll_take(&mut Context::from_waker(Waker::noop()), bytes)
            .is_ready()
    }

    #[test]
    fn the_connection_has_a_limit_and_one_request_always_fits() {
        let mut account = Account::new(Budget::new(64 * MIB), 8 * MIB);
        assert!(take(&mut account, 20 * MIB), "alone, any length fits");
        assert!(!take(&mut account, 1));
        account.give(20 * MIB);
        assert!(take(&mut account, 8 * MIB) && !take(&mut account, 1));
        assert_eq!(account.used, 8 * MIB);
    }

    #[test]
    fn a_spent_budget_leaves_everyone_the_allowance() {
        let budget = Budget::new(4 * MIB);
        let mut greedy = Account::new(budget.clone(), 64 * MIB);
        let mut modest = Account::new(budget.clone(), 64 * MIB);
        assert!(take(&mut greedy, 5 * MIB));
        assert!(take(&mut modest, MIB), "the allowance is its own");
        assert!(!take(&mut modest, MIB));
        assert!(greedy.holds_up_others() && !modest.holds_up_others());
        greedy.give(MIB);
        assert!(take(&mut modest, MIB), "and what comes back goes round");
        assert!(!budget.is_contended());
        drop((greedy, modest));
        assert_eq!(
            budget.inner.permits.available_permits(),
            4 * MIB / Budget::UNIT
        );
    }

    #[test]
    fn an_account_that_ends_while_it_waits_leaves_nothing_behind() {
        let budget = Budget::new(MIB);
        let mut first = Account::new(budget.clone(), 64 * MIB);
        let mut second = Account::new(budget.clone(), 64 * MIB);
        assert!(take(&mut first, 2 * MIB) && !take(&mut second, 2 * MIB));
        drop(second);
        assert!(!budget.is_contended());
        drop(first);
        assert_eq!(budget.inner.permits.available_permits(), MIB / Budget::UNIT);
    }

    #[test]
    fn a_request_beyond_the_whole_budget_is_served_alone() {
        let mut account = Account::new(Budget::new(MIB), 8 * MIB);
        assert!(take(&mut account, 64 * MIB));
        account.give(64 * MIB);
        assert!(take(&mut account, 2 * MIB));
    }
}
