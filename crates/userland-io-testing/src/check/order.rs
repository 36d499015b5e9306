//! A relation on a few things, and its transitive closure.

#[derive(Debug)]
pub(super) struct Order {
    n: usize,
    words: usize,
    rows: Vec<u64>,
}

impl Order {
    pub(super) fn new(n: usize) -> Self {
        let words = n.div_ceil(64);
        Order {
            n,
            words,
            rows: vec![0; n * words],
        }
    }

    pub(super) fn put(&mut self, before: usize, after: usize) {
        self.rows[before * self.words + after / 64] |= 1 << (after % 64);
    }

    pub(super) fn has(&self, before: usize, after: usize) -> bool {
        (self.rows[before * self.words + after / 64] >> (after % 64)) & 1 == 1
    }

    pub(super) fn close(&mut self) {
        for via in 0..self.n {
            for from in 0..self.n {
                if self.has(from, via) {
                    for word in 0..self.words {
                        self.rows[from * self.words + word] |= self.rows[via * self.words + word];
                    }
                }
            }
        }
    }

    /// Two that come before each other.
    pub(super) fn cycle(&self) -> Option<(usize, usize)> {
        let mut pairs = (0..self.n).flat_map(|a| (0..a).map(move |b| (b, a)));
        pairs.find(|&(a, b)| self.has(a, b) && self.has(b, a))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_finds_ways_and_cycles_beyond_one_word() {
        let mut order = Order::new(130);
        for at in 0..129 {
            order.put(at, at + 1);
        }
        order.close();
        assert!(order.has(0, 129) && !order.has(129, 0));
        assert_eq!(order.cycle(), None);
        order.put(129, 70);
        order.close();
        assert_eq!(order.cycle(), Some((70, 71)));
    }
}
