//! A partition table for tests.

/// An MBR with one partition, which begins at sector `start` and has `sectors` of them.
pub(crate) fn table(start: u32, sectors: u32) -> [u8; 512] {
    let mut table = [0; 512];
    // The first entry: not active, Linux; its places in cylinders are left out.
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&start.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    table
}
