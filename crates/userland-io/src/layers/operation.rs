//! The operations by name, for layers that treat each its own way.

use std::fmt;

/// An operation of an [`Engine`](crate::Engine).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// [`Engine::read`](crate::Engine::read)
    Read,
    /// [`Engine::write`](crate::Engine::write)
    Write,
    /// [`Engine::flush`](crate::Engine::flush)
    Flush,
    /// [`Engine::discard`](crate::Engine::discard)
    Discard,
    /// [`Engine::write_zeroes`](crate::Engine::write_zeroes)
    WriteZeroes,
    /// [`Engine::extents`](crate::Engine::extents)
    Extents,
    /// [`Engine::status`](crate::Engine::status)
    Status,
    /// [`Engine::prefetch`](crate::Engine::prefetch)
    Prefetch,
}

impl Operation {
    /// Every operation, in the order of their declaration.
    pub const ALL: [Operation; 8] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Discard,
        Operation::WriteZeroes,
        Operation::Extents,
        Operation::Status,
        Operation::Prefetch,
    ];

    /// The name of the method.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write_zeroes",
            Operation::Extents => "extents",
            Operation::Status => "status",
            Operation::Prefetch => "prefetch",
        }
    }

    /// The operation of that [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Operation::ALL.into_iter().find(|op| op.name() == name)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Operation;

    #[test]
    fn names_lead_back_and_order_is_that_of_all() {
        for (n, op) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(Operation::from_name(op.name()), Some(op));
            assert_eq!(op as usize, n);
        }
        assert_eq!(Operation::from_name("trim"), None);
    }
}
