//! Staying awake for some microseconds after the last reply, because the next request is often that near.
//!
//! To sleep and be woken takes longer than most requests. So a connection with nothing to do first
//! asks its socket again and again, giving its core away in between if others work, too ([`Others`] tell). That costs processor time if
//! nothing comes: after some misses in a row it sleeps at once for a while, and for longer each time,
//! until lingering pays again. No more connections linger at a time than there are cores, and none
//! while so many work that whoever lingers keeps others waiting.

use std::hint;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::socket::Company;
use super::company::{Everyone, Others};

/// For how long, beside others or for several requests at a time. 10 us are too short for a client that must be woken on another
/// core of a virtual machine first, and 40 bring nothing more.
const PATIENCE: Duration = Duration::from_micros(25);
/// The same for one who works alone and gets requests one at a time: server and client sleep in turn then,
/// and each sleep is in the way of each request. 40 us do as well, 70 cost more than they bring. Not if requests themselves
/// take longer than that: then there is little to win.
const PATIENCE_ALONE: Duration = Duration::from_micros(50);
/// So many misses in a row are bad luck.
const MISSES: u32 = 3;
/// The most chances to linger that are let go by in a row.
const LONGEST_PAUSE: u32 = 1024;
/// For how long a task may go on without going back to its runtime, which looks after the other
/// sockets only then, while others work.
const TURN: Duration = Duration::from_micros(300);
/// The same while nobody else does; who comes anew waits for it.
const TURN_ALONE: Duration = Duration::from_millis(1);
/// How long one who works alone waits before it asks again: less than a reply takes to become a request. Giving the core away takes as long, and
/// more if the client is there, since it had better stay on its own.
const BREATH: Duration = Duration::from_micros(1);
/// Nobody asks sooner for each so many requests that came at a time: it takes a client longer to make as many anew.
const BREATHS: usize = 8;
/// The longest breath, in [`BREATH`]s.
const LONGEST_BREATH: usize = 8;

/// Who may linger at a time: the connections of one server share it.
#[derive(Clone, Debug)]
pub struct Chairs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    free: AtomicUsize,
    everyone: Everyone,
    /// For how long one asks: [`PATIENCE`] or [`PATIENCE_ALONE`].
    patience: [Duration; 2],
    /// For how long a task goes on: [`TURN`] or [`TURN_ALONE`].
    turn: [Duration; 2],
    /// Whoever waits for a core has one if a single connection keeps another.
    has_cores: bool,
}

impl Default for Chairs {
    /// One for each core.
    fn default() -> Self {
        Chairs::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Chairs {
    fn new(chairs: usize) -> Self {
        Chairs(Arc::new(Shared {
            free: AtomicUsize::new(chairs),
            everyone: Everyone::new(chairs),
            patience: [PATIENCE, PATIENCE_ALONE],
            turn: [TURN, TURN_ALONE],
            has_cores: chairs > 1,
        }))
    }

    fn sit(&self) -> Option<Seated<'_>> {
        // Nothing is read or written under a chair's protection: it only counts.
        self.0
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
                free.checked_sub(1)
            })
            .is_ok()
            // Lazily: a chair that was not taken must not be given back.
            .then(|| Seated(self))
    }
}

struct Seated<'a>(&'a Chairs);

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        self.0.0.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// One connection's experience with lingering.
#[derive(Debug)]
pub(super) struct Linger {
    chairs: Chairs,
    others: Others,
    misses: u32,
    /// So many chances are let go by.
    pause: u32,
    /// How long the last pause was.
    last_pause: u32,
    /// When what it works on came, or when it was woken for it.
    began: Option<Instant>,
    /// When the task's turn began, if it has been prolonged.
    turn: Option<Instant>,
}

impl Drop for Linger {
    fn drop(&mut self) {
        self.others.leave(&self.chairs.0.everyone);
    }
}

/// What came of a chance to linger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lingered {
    /// So many bytes came; 0 at the end of the stream.
    Came(usize),
    /// Nothing; the task should sleep.
    Nothing,
    /// The task has been awake for long enough: others should have a turn, then it may go on.
    Enough,
}

impl Linger {
    pub(super) fn new(chairs: Chairs) -> Self {
        Linger {
            others: Others::join(&chairs.0.everyone),
            chairs,
            misses: 0,
            pause: 0,
            last_pause: 0,
            began: None,
            turn: None,
        }
    }

    /// Notes that the connection has been woken.
    pub(super) fn wake(&mut self) {
        self.began.get_or_insert_with(Instant::now);
        self.others.begin_turn(&self.chairs.0.everyone);
    }

    /// Notes that it goes to sleep.
    pub(super) fn sleep(&mut self) {
        self.others.end_turn(&self.chairs.0.everyone);
    }

    /// See [`Others::company`].
    pub(super) fn company(&self) -> Company {
        self.others.company()
    }

    /// See [`Others::believe`].
    pub(super) fn believe(&mut self, company: Company) {
        self.others.believe(company);
    }

    /// Asks `receive` until something comes or it has been long enough. `batch` requests came at a time.
    pub(super) fn wait(
        &mut self,
        batch: usize,
        mut receive: impl FnMut() -> Option<usize>,
    ) -> Lingered {
        let began = self.began.take();
        if self.others.are_crowd() {
            return Lingered::Nothing;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Lingered::Nothing;
        }
        let shared = &*self.chairs.0;
        let Some(seated) = self.chairs.sit() else {
            self.turn = None;
            return Lingered::Nothing;
        };
        let start = Instant::now();
        let is_alone = shared.has_cores && self.others.are_idle(&shared.everyone);
        let turn = shared.turn[usize::from(is_alone)];
        if start.duration_since(*self.turn.get_or_insert(start)) >= turn {
            self.turn = None;
            return Lingered::Enough;
        }
        let [patience, longer] = shared.patience;
        let is_quick = began.is_some_and(|began| start.duration_since(began) < longer);
        let patience = match is_alone && is_quick && batch <= 1 {
            true => longer,
            false => patience,
        };
        let breath = BREATH * (batch / BREATHS).clamp(1, LONGEST_BREATH) as u32;
        let (came, asked) = loop {
            let came = receive();
            let asked = Instant::now();
            if came.is_some() || asked.duration_since(start) >= patience {
                break (came, asked);
            }
            if is_alone {
                while asked.elapsed() < breath {
                    hint::spin_loop();
                }
            } else {
                // Whoever it waits for may need this core.
                thread::yield_now();
            }
        };
        drop(seated);
        match came {
            Some(came) => {
                (self.misses, self.last_pause) = (0, 0);
                self.began = Some(asked);
                Lingered::Came(came)
            }
            None => {
                self.miss();
                Lingered::Nothing
            }
        }
    }

    fn miss(&mut self) {
        self.turn = None;
        self.misses += 1;
        if self.misses >= MISSES {
            self.last_pause = (2 * self.last_pause).clamp(2, LONGEST_PAUSE);
            self.pause = self.last_pause;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any test takes, on whatever machine.
    const LONG: Duration = Duration::from_secs(3600);

    /// Chairs whose users are patient for so long, and whose turns do not end.
    fn chairs(patience: Duration) -> Chairs {
        let mut chairs = Chairs::new(1);
        let shared = Arc::get_mut(&mut chairs.0).unwrap();
        (shared.patience, shared.turn) = ([patience; 2], [LONG, LONG]);
        chairs
    }

    /// How many of `chances` are taken, if nothing ever comes.
    fn taken(linger: &mut Linger, chances: u32) -> u32 {
        let mut taken = 0;
        for _ in 0..chances {
            let mut asked = false;
            let lingered = linger.wait(1, || {
                asked = true;
                None
            });
            assert_eq!(lingered, Lingered::Nothing);
            taken += u32::from(asked);
        }
        taken
    }

    #[test]
    fn a_client_that_is_never_near_costs_one_wait_in_a_thousand() {
        let mut linger = Linger::new(chairs(PATIENCE));
        // Three misses, then pauses of 2, 4 ... 1024.
        assert_eq!(taken(&mut linger, 3 + 2046 + 9), 3 + 9);
        assert_eq!(taken(&mut linger, 10 * 1025), 10);
    }

    #[test]
    fn one_request_that_comes_in_time_ends_the_pauses() {
        let mut linger = Linger::new(chairs(PATIENCE));
        taken(&mut linger, 3);
        let mut chances = 0;
        while linger.wait(1, || Some(28)) != Lingered::Came(28) {
            chances += 1;
        }
        assert_eq!(chances, 2);
        assert_eq!(taken(&mut linger, 3), 3);
        assert_eq!(taken(&mut linger, 3), 1);
    }

    #[test]
    fn it_asks_until_something_comes() {
        let mut linger = Linger::new(chairs(LONG));
        let mut left = 3;
        let lingered = linger.wait(1, || {
            left -= 1;
            (left == 0).then_some(5)
        });
        assert_eq!(lingered, Lingered::Came(5));
        assert_eq!(linger.chairs.0.free.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn who_gets_one_request_at_a_time_and_is_alone_waits_longer() {
        let (short, long) = (Duration::from_millis(1), Duration::from_millis(100));
        let waited = |cores: usize, batch: usize, others: usize, works: Duration| {
            let mut chairs = Chairs::new(cores);
            let shared = Arc::get_mut(&mut chairs.0).unwrap();
            (shared.patience, shared.turn) = ([short, long], [LONG, LONG]);
            let (mut linger, mut other) = (Linger::new(chairs.clone()), Linger::new(chairs));
            linger.sleep();
            linger.wake();
            (0..others).for_each(|_| other.wake());
            thread::sleep(works);
            let start = Instant::now();
            assert_eq!(linger.wait(batch, || None), Lingered::Nothing);
            start.elapsed()
        };
        let none = Duration::ZERO;
        // However slow this machine is at times.
        assert!((0..100).any(|_| waited(2, 1, 0, none) >= long));
        assert!((0..100).any(|_| waited(2, 2, 0, none) < long));
        assert!((0..100).any(|_| waited(2, 1, 1, none) < long));
        assert!((0..100).any(|_| waited(2, 1, 0, long) < long));
        // Its client needs the only core.
        assert!((0..100).any(|_| waited(1, 1, 0, none) < long));
    }

    #[test]
    fn no_more_linger_at_a_time_than_there_are_chairs() {
        let chairs = chairs(LONG);
        let mut inner = Linger::new(chairs.clone());
        Linger::new(chairs).wait(1, || {
            // Again and again: to ask for a chair in vain makes none.
            for _ in 0..3 {
                assert_eq!(inner.wait(1, || Some(1)), Lingered::Nothing);
            }
            Some(1)
        });
        assert_eq!(inner.wait(1, || Some(1)), Lingered::Came(1));
    }

    #[test]
    fn nobody_lingers_in_a_crowd() {
        let chairs = chairs(LONG);
        let (mut linger, mut others) = (Linger::new(chairs.clone()), Linger::new(chairs));
        let mut after = |of_others: usize| {
            linger.sleep();
            (0..of_others).for_each(|_| others.wake());
            linger.wake();
            linger.wait(1, || Some(1))
        };
        assert_eq!(after(1), Lingered::Came(1));
        assert_eq!(after(100), Lingered::Nothing);
        assert_eq!(after(1), Lingered::Came(1));
    }

    #[test]
    fn one_that_has_ended_is_counted_no_more() {
        let chairs = chairs(LONG);
        let mut all: Vec<_> = (0..100).map(|_| Linger::new(chairs.clone())).collect();
        let mut company = |count: usize| {
            all.truncate(count);
            for _ in 0..100 {
                for linger in &mut all {
                    linger.wake();
                    linger.sleep();
                }
            }
            all[0].company()
        };
        assert_eq!(company(100), Company::NoneOrMany);
        assert_eq!(company(2), Company::Few);
    }

    #[test]
    fn a_turn_ends_however_fast_requests_come() {
        let turn = |is_alone: bool| {
            let chairs = Chairs::new(2);
            let (mut linger, mut other) = (Linger::new(chairs.clone()), Linger::new(chairs));
            linger.wake();
            if !is_alone {
                other.wake();
            }
            let start = Instant::now();
            while linger.wait(1, || Some(28)) != Lingered::Enough {
                assert!(start.elapsed() < Duration::from_secs(10));
            }
            let took = start.elapsed();
            // And the next one begins.
            assert_eq!(linger.wait(1, || Some(28)), Lingered::Came(28));
            took
        };
        assert!(turn(true) >= TURN_ALONE);
        assert!(turn(false) >= TURN);
        // Sooner, however slow this machine is at times.
        assert!((0..1000).any(|_| turn(false) < TURN_ALONE));
    }
}
