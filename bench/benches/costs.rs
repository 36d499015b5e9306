//! What the pieces of a request's way cost by the clock: `cargo bench -p bench`.

use bench::cases::{CASES, Case};
use divan::{Bencher, counter::ItemsCount};

fn main() {
    divan::main();
}

const REPEATS: u64 = 64_000;

fn names() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|case| case.name)
}

#[divan::bench(args = names(), sample_count = 20, sample_size = 1)]
fn requests(bencher: Bencher<'_, '_>, name: &str) {
    let case: Option<&Case> = CASES.iter().find(|case| case.name == name);
    let Some(case) = case else { return };
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().build();
    let runtime = runtime.expect("a runtime");
    let counted = bencher.counter(ItemsCount::new(REPEATS));
    counted.bench_local(|| runtime.block_on((case.run)(REPEATS)));
}
