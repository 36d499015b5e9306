//! What is inside the data of an option, read with every length checked.

use crate::transports::nbd::wire;

/// Why data cannot be what the option says; told to the client.
pub(super) type Malformed = &'static str;

/// Takes fields from the front of an option's data.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Fields(data)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self
            .0
            .split_at_checked(length)
            .ok_or("a field reaches beyond the data")?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or("the data are too short")?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        string(self.take(length)?)
    }

    fn end(self) -> Result<(), Malformed> {
        match self.0 {
            [] => Ok(()),
            _ => Err("bytes follow the last field"),
        }
    }
}

/// "A sequence of UTF-8 code points ... MUST NOT contain NUL characters ... no longer than 4096 bytes"
/// ("Conventions").
pub(super) fn string(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > wire::MAX_STRING {
        return Err("a string is longer than 4096 bytes");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")?;
    match text.contains('\0') {
        true => Err("a string contains a NUL"),
        false => Ok(text),
    }
}

/// The data of `INFO` and `GO`.
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    pub(super) export_name: bool,
    pub(super) description: bool,
    pub(super) block_size: bool,
}

impl<'a> InfoRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        let mut request = InfoRequest {
            name: fields.string()?,
            export_name: false,
            description: false,
            block_size: false,
        };
        for _ in 0..fields.u16()? {
            match fields.u16()? {
                wire::info::NAME => request.export_name = true,
                wire::info::DESCRIPTION => request.description = true,
                wire::info::BLOCK_SIZE => request.block_size = true,
                // "The server MUST ignore any information requests it does not understand."
                _ => {}
            }
        }
        fields.end()?;
        Ok(request)
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub(super) struct MetaRequest<'a> {
    pub(super) name: &'a str,
    pub(super) queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        // Grows with the queries that are there, whatever their number claims.
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = fields.string()?;
            match query.split_once(':') {
                None | Some(("", _)) => return Err("a query is not namespace:leaf"),
                Some(_) => queries.push(query),
            }
        }
        fields.end()?;
        Ok(MetaRequest { name, queries })
    }
}
