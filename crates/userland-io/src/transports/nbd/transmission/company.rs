//! Who else works: what a connection can tell of the others by how often they are woken.
//!
//! A turn begins when a connection is woken and ends when it goes to sleep. [`Everyone`]'s are counted together. What that
//! count has gone up by while one slept tells it of the moment: others are idle, or a crowd. Its [`Others`] remember it,
//! too, for what is worth a move only if it lasts: whether they are [`Company`]. Who has had some turns in an era, which
//! is so many of all, works; if more do than can have a thread each, that is a throng.
//!
//! Any connection may touch the shared counters at any time, but only adds to them: one when it comes, which it takes back
//! when it goes, one as each of its turns begins, and at most one in an era for being at work. Whoever has an era's first
//! turn begins that count anew. All else only reads. They are but counts: nothing is read or written under their protection.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::socket::Company;

/// So many others' turns for each core, between two of a connection's own, make a crowd.
const CROWD: usize = 8;
/// If more connections than that work, for each core, they are too many for a thread each.
const THRONG: usize = 32;
/// Who works is counted over so many turns, for each core: a thread and its client may have some hundred
/// before the kernel lets another pair have its own.
const ERA: usize = 1 << 14;
/// Who has had so many of them works: by its share of turns, not by the clock. Thousands that work alike have as many each.
const WORKS: u8 = 4;
/// How many turns in a row without others tell that none work: those of a client that shares its core with theirs may come one after the other for some milliseconds.
const SURE: u16 = 1024;
/// What a turn beside others weighs, which is seen much sooner.
const BESIDE: u16 = 32;
/// What a turn in a throng weighs.
const THRONGED: u16 = 64;

/// What the connections of one server count together.
#[derive(Debug)]
pub(super) struct Everyone {
    /// How many turns of others are a crowd.
    crowd: usize,
    /// More connections than that are a throng.
    throng: usize,
    /// How often a connection has been woken.
    turns: AtomicUsize,
    /// How many there are.
    connections: AtomicUsize,
    /// How many have worked in this era and in the one before, by turns in either place. Whoever begins an
    /// era may lose some.
    at_work: [AtomicUsize; 2],
    /// How many turns are an era.
    era: usize,
}

impl Everyone {
    pub(super) fn new(cores: usize) -> Self {
        Everyone {
            crowd: cores * CROWD,
            throng: cores * THRONG,
            turns: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            at_work: Default::default(),
            era: cores * ERA,
        }
    }

    fn turns(&self) -> usize {
        self.turns.load(Ordering::Relaxed)
    }

    /// True if too many connections work for a thread each.
    fn are_throng(&self) -> bool {
        let is_throng = |count: &AtomicUsize| count.load(Ordering::Relaxed) > self.throng;
        // What the last throng was counts for nothing once its connections have closed.
        is_throng(&self.connections) && self.at_work.iter().any(is_throng)
    }
}

/// The others, as one connection has come to know them. It hands in its server's [`Everyone`] each time.
#[derive(Debug)]
pub(super) struct Others {
    /// The count of turns when this connection went to sleep.
    slept_at: usize,
    /// The same when it was woken.
    woken_at: usize,
    are_crowd: bool,
    are_throng: bool,
    /// The era of this connection's last turn, and how many it has had in it, up to [`WORKS`].
    era: usize,
    turns_in_era: u8,
    /// Goes up with each turn beside a few others, to [`SURE`], and down with each alone or in a throng.
    beside: u16,
}

impl Others {
    /// Those of a connection that comes.
    pub(super) fn join(everyone: &Everyone) -> Self {
        everyone.connections.fetch_add(1, Ordering::Relaxed);
        Others {
            slept_at: 0,
            woken_at: 0,
            are_crowd: false,
            are_throng: false,
            era: usize::MAX,
            turns_in_era: 0,
            beside: 0,
        }
    }

    /// Notes that the connection goes, once.
    pub(super) fn leave(&self, everyone: &Everyone) {
        everyone.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that it has been woken, and what others did while it slept.
    pub(super) fn begin_turn(&mut self, everyone: &Everyone) {
        let turns = self.count_turn(everyone);
        self.are_throng = everyone.are_throng();
        let others = turns.wrapping_sub(self.slept_at);
        self.are_crowd = others > everyone.crowd;
        self.beside = match others {
            0 => self.beside.saturating_sub(1),
            _ if self.are_throng => self.beside.saturating_sub(THRONGED),
            _ => (self.beside + BESIDE).min(SURE),
        };
        self.woken_at = turns.wrapping_add(1);
    }

    /// Counts a turn. Answers how many all connections have had before.
    fn count_turn(&mut self, everyone: &Everyone) -> usize {
        let turns = everyone.turns.fetch_add(1, Ordering::Relaxed);
        let era = turns / everyone.era;
        let at_work = &everyone.at_work[era % 2];
        if turns.is_multiple_of(everyone.era) {
            at_work.store(0, Ordering::Relaxed);
        }
        if self.era != era {
            (self.era, self.turns_in_era) = (era, 0);
        }
        if self.turns_in_era < WORKS {
            self.turns_in_era += 1;
            if self.turns_in_era == WORKS {
                at_work.fetch_add(1, Ordering::Relaxed);
            }
        }
        turns
    }

    /// Notes that it goes to sleep.
    pub(super) fn end_turn(&mut self, everyone: &Everyone) {
        self.slept_at = everyone.turns();
    }

    /// Who has worked lately.
    pub(super) fn company(&self) -> Company {
        match self.beside {
            0 => Company::NoneOrMany,
            at if at >= SURE / 2 => Company::Few,
            _ => Company::Unsure,
        }
    }

    /// Takes `company` for sure: a connection that has gone where that is best does not come back at once.
    pub(super) fn believe(&mut self, company: Company) {
        self.beside = match company {
            Company::Few => SURE,
            Company::Unsure => SURE / 4,
            Company::NoneOrMany => 0,
        };
    }

    /// So many worked while this one slept that whoever keeps a core keeps others waiting.
    pub(super) fn are_crowd(&self) -> bool {
        self.are_crowd
    }

    /// Nobody else works, nor has begun to since this one was woken.
    pub(super) fn are_idle(&self, everyone: &Everyone) -> bool {
        self.beside == 0 && !self.are_throng && everyone.turns() == self.woken_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(everyone: &Everyone, count: usize) -> Vec<Others> {
        (0..count).map(|_| Others::join(everyone)).collect()
    }

    fn turn(others: &mut Others, everyone: &Everyone) {
        others.begin_turn(everyone);
        others.end_turn(everyone);
    }

    #[test]
    fn more_others_turns_than_eight_for_each_core_are_a_crowd() {
        let everyone = Everyone::new(2);
        let mut all = all(&everyone, 2);
        let mut are_crowd = |count: usize| {
            all[0].end_turn(&everyone);
            (0..count).for_each(|_| turn(&mut all[1], &everyone));
            all[0].begin_turn(&everyone);
            all[0].are_crowd()
        };
        assert_eq!([16, 17, 1].map(&mut are_crowd), [false, true, false]);
    }

    #[test]
    fn others_are_idle_until_one_is_woken() {
        let everyone = Everyone::new(2);
        let mut all = all(&everyone, 2);
        all[0].begin_turn(&everyone);
        assert!(all[0].are_idle(&everyone));
        turn(&mut all[1], &everyone);
        assert!(!all[0].are_idle(&everyone));
        // Seen in the last turn, it may be at work again at any time.
        turn(&mut all[0], &everyone);
        all[0].begin_turn(&everyone);
        assert!(!all[0].are_idle(&everyone));
    }

    #[test]
    fn company_is_seen_soon_and_its_end_after_a_while() {
        let everyone = Everyone::new(1);
        let (mut mine, mut theirs) = (Others::join(&everyone), Others::join(&everyone));
        let mut after = |mine: &mut Others, of_others: usize| {
            mine.end_turn(&everyone);
            (0..of_others).for_each(|_| theirs.begin_turn(&everyone));
            mine.begin_turn(&everyone);
            mine.company()
        };
        assert_eq!(after(&mut mine, 0), Company::NoneOrMany);
        let turns = (1..).find(|_| after(&mut mine, 1) == Company::Few);
        assert_eq!(turns, Some(16));
        mine.believe(Company::Few);
        let turns = (1..).find(|_| after(&mut mine, 0) == Company::NoneOrMany);
        assert_eq!(turns, Some(1024));
    }

    #[test]
    fn a_throng_is_told_by_who_works_and_not_by_how_often() {
        const MOST: usize = 2 * THRONG;
        let everyone = Everyone::new(2);
        let mut all = all(&everyone, MOST + 1);
        // Everybody has many turns with one other's in between before the next ones have theirs.
        let eras = |all: &mut [Others], count: usize| {
            let start = everyone.turns() / everyone.era;
            for first in (0..count).cycle() {
                for _ in 0..100 {
                    turn(&mut all[first], &everyone);
                    turn(&mut all[(first + 1) % count], &everyone);
                }
                if everyone.turns() / everyone.era > start + 1 {
                    break;
                }
            }
            let company = all[..count].iter().map(Others::company);
            company.collect::<Vec<_>>()
        };
        assert_eq!(eras(&mut all, MOST + 1), [Company::NoneOrMany; MOST + 1]);
        // In it nobody is alone, however long the others have slept.
        all[0].begin_turn(&everyone);
        assert!(!all[0].are_idle(&everyone));
        assert_eq!(eras(&mut all, MOST), [Company::Few; MOST]);
        let soon = |all: &mut [Others]| {
            for _ in 0..16 {
                turn(&mut all[0], &everyone);
                turn(&mut all[1], &everyone);
            }
            all[0].company()
        };
        // Those who have but little to do are no throng.
        for others in &mut all {
            (1..WORKS).for_each(|_| turn(others, &everyone));
        }
        assert_eq!(soon(&mut all), Company::Few);
        // Nor is one that has gone.
        eras(&mut all, MOST + 1);
        all.drain(2..).for_each(|others| others.leave(&everyone));
        assert_eq!(soon(&mut all), Company::Few);
    }
}
