//! Stacks as words: `file:disk.img,size=10G delay:read=5ms`.
//!
//! A stack is words, bottom first: the engine, then each layer over it. A word is
//! `name:positional,key=value,flag`; what the names and their keys are stands in a
//! [`Registry`], and the table that a word is read by is the one its help is made of.
//!
//! `words` cuts text into words and knows no names; `values` reads one value;
//! `options` and `catalogue` hold the key tables and what was given for them;
//! `registry` brings the two together and opens the stack; `builtin` has this
//! library's own names. Only this module knows every engine and layer.
//!
//! ```
//! use userland_io::{Device, stack::Registry};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = Device::open(Registry::builtin().open("null:10G").await?).await?;
//! assert_eq!(disk.geometry().size, 10 << 30);
//! let error = Registry::builtin().open("null:10G,sizzle=3").await.unwrap_err();
//! eprintln!("{}", error.render());
//! # Ok(())
//! # }
//! ```

mod builtin;
mod catalogue;
mod error;
mod options;
mod registry;
mod values;
mod words;

pub use catalogue::{Entry, Key, Role};
pub use error::{StackError, StackErrorKind};
pub use options::{Options, Refusal};
pub use registry::{Plan, Registry};
pub use values::{FromValue, Kind, Value, ValueError, parse_duration, parse_size};
pub use words::{Item, Text, Word, Words};
