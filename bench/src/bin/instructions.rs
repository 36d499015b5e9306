//! One request, many times over, for callgrind to count its instructions: `instructions CASE REPEATS`.
//! Without words it prints the cases.
//!
//! Nothing here depends on time or chance: one thread, no sockets, and a stream that has the next requests at hand
//! whenever it is asked, so that the server never waits.
#![forbid(unsafe_code)]

use bench::cases;

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [case, repeats] = &words[..] else {
        cases::CASES
            .iter()
            .for_each(|case| println!("{}", case.name));
        return Ok(());
    };
    let repeats = repeats.parse().map_err(std::io::Error::other)?;
    let case = cases::CASES.iter().find(|known| known.name == case);
    let case = case.ok_or_else(|| std::io::Error::other("no such case"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    runtime.block_on((case.run)(repeats));
    Ok(())
}
