//! Tables made by hand, damaged ones, and noise.

use proptest::prelude::*;

use super::gpt::crc32;
use super::*;
use crate::engines::Memory;
use crate::{EngineExt, Layer, WriteBuf, WriteFlags};

const BLOCK: usize = 512;
/// The blocks of the disks here.
const BLOCKS: u64 = 2048;

struct Image(Vec<u8>);

impl Image {
    fn new() -> Self {
        Image(vec![0; BLOCKS as usize * BLOCK])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Entry `n` of the table in the sector `lba`.
    fn entry(&mut self, lba: usize, n: usize, kind: u8, first: u32, blocks: u32) {
        let at = lba * BLOCK + 446 + 16 * n;
        self.put(at + 4, &[kind]);
        self.put(at + 8, &first.to_le_bytes());
        self.put(at + 12, &blocks.to_le_bytes());
        self.put(lba * BLOCK + 510, &[0x55, 0xaa]);
    }

    /// A GPT header at `own` for the entries at `entries`, and its sums.
    fn header(&mut self, block: usize, own: u64, alternate: u64, entries: u64) {
        let at = own as usize * block;
        let list = entries as usize * block;
        let sum = crc32(&self.0[list..list + 128 * 128]);
        self.put(at, b"EFI PART\0\0\x01\0\x5c\0\0\0");
        self.put(at + 16, &[0; 8]);
        for (offset, value) in [(24, own), (32, alternate), (72, entries)] {
            self.put(at + offset, &value.to_le_bytes());
        }
        for (offset, value) in [(80, 128), (84, 128), (88, sum)] {
            self.put(at + offset, &u32::to_le_bytes(value));
        }
        let sum = crc32(&self.0[at..at + 92]);
        self.put(at + 16, &sum.to_le_bytes());
    }

    fn gpt(block: usize, partitions: &[(usize, u64, u64)]) -> Self {
        let mut image = Image::new();
        image.entry(0, 0, 0xee, 1, u32::MAX);
        let last = (image.0.len() / block) as u64 - 1;
        let backup = last - (128 * 128 / block) as u64;
        for &(number, first, end) in partitions {
            for list in [2, backup] {
                let at = list as usize * block + (number - 1) * 128;
                image.put(at, &[1; 16]);
                image.put(at + 32, &first.to_le_bytes());
                image.put(at + 40, &end.to_le_bytes());
            }
        }
        image.header(block, 1, last, 2);
        image.header(block, last, 1, backup);
        image
    }

    async fn disk(&self) -> Checked<Memory> {
        let disk = Checked::new(Memory::new(self.0.len() as u64)).unwrap();
        disk.write(&WriteBuf::new(&self.0), 0, WriteFlags::empty())
            .await
            .unwrap();
        disk
    }

    async fn table(&self) -> Result<PartitionTable> {
        PartitionTable::read(&self.disk().await).await
    }

    async fn error(&self) -> String {
        self.table().await.unwrap_err().to_string()
    }
}

fn blocks(table: &PartitionTable) -> Vec<(u32, u64, u64)> {
    let list = table.iter();
    list.map(|p| (p.number, p.start / 512, p.size / 512))
        .collect()
}

#[test]
fn the_sum_is_that_of_the_standard() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[tokio::test]
async fn primary_and_logical_partitions_are_found() {
    let mut image = Image::new();
    image.entry(0, 0, 0x83, 100, 50);
    image.entry(0, 3, 0x05, 200, 500);
    image.entry(200, 0, 0x83, 1, 10);
    image.entry(200, 1, 0x05, 100, 60);
    image.entry(300, 0, 0x82, 2, 20);
    image.entry(300, 1, 0x05, 200, 60);
    image.entry(400, 0, 0x83, 3, 30);
    let table = image.table().await.unwrap();
    assert_eq!(table.kind(), TableKind::Mbr);
    assert_eq!(table.damage(), None);
    assert_eq!(
        blocks(&table),
        [
            (1, 100, 50),
            (4, 200, 500),
            (5, 201, 10),
            (6, 302, 20),
            (7, 403, 30)
        ]
    );
    assert_eq!(
        table.get(2).unwrap_err().to_string(),
        "there is no partition 2; there are 1, 4, 5, 6, 7"
    );
}

#[tokio::test]
async fn a_chain_that_turns_back_ends() {
    let mut image = Image::new();
    image.entry(0, 0, 0x0f, 200, 500);
    image.entry(200, 0, 0x83, 1, 10);
    image.entry(200, 1, 0x05, 100, 60);
    image.entry(300, 0, 0x83, 1, 10);
    image.entry(300, 1, 0x05, 0, 60);
    let table = image.table().await.unwrap();
    assert_eq!(blocks(&table), [(1, 200, 500), (5, 201, 10), (6, 301, 10)]);
    let error = table.get(7).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "(the chain of logical partitions turns back, or has no end, at byte 153600)"
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_chain_of_empty_sectors_ends() {
    let mut image = Image::new();
    image.entry(0, 0, 0x05, 1, 1500);
    for n in 1..1000 {
        image.entry(n, 1, 0x05, n as u32, 1);
    }
    let table = image.table().await.unwrap();
    assert!(
        table
            .damage()
            .unwrap()
            .ends_with("has no end, at byte 131072")
    );
}

#[tokio::test]
async fn a_chain_that_leads_nowhere_keeps_what_came_before() {
    let mut image = Image::new();
    image.entry(0, 1, 0x05, 200, 500);
    image.entry(200, 0, 0x83, 1, 10);
    image.entry(200, 1, 0x05, u32::MAX, 60);
    let table = image.table().await.unwrap();
    assert_eq!(blocks(&table), [(2, 200, 500), (5, 201, 10)]);
    assert!(table.damage().unwrap().contains("breaks off"));
}

#[tokio::test]
async fn a_partition_beyond_the_end_is_refused_by_name() {
    let mut image = Image::new();
    image.entry(0, 0, 0x83, 2000, 100);
    let table = image.table().await.unwrap();
    assert_eq!(table.iter().count(), 0);
    assert_eq!(
        table.get(1).unwrap_err().to_string(),
        "partition 1 does not lie inside the disk: 100 blocks of 512 bytes from block 2000 on, \
         and the disk has 1048576 bytes"
    );
}

#[tokio::test]
async fn no_table_is_told_from_an_empty_one() {
    let none = "there is no partition table on this disk (its first sector is no MBR)";
    assert_eq!(Image::new().error().await, none);
    // The first sector of a file system: the signature, but code where the entries would be.
    let mut image = Image::new();
    image.put(446, &[0xaa; 64]);
    image.put(510, &[0x55, 0xaa]);
    assert_eq!(image.error().await, none);
    let mut image = Image::new();
    image.put(510, &[0x55, 0xaa]);
    let error = image.table().await.unwrap().get(1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no partition 1; the table is empty"
    );
    assert_eq!(
        Image(vec![0; 100]).error().await,
        "the disk is too small for a partition table"
    );
}

#[tokio::test]
async fn a_gpt_counts_in_small_or_large_blocks() {
    for block in [512, 4096] {
        let image = Image::gpt(block, &[(1, 50, 59), (128, 60, 60)]);
        let table = image.table().await.unwrap();
        let factor = block as u64 / 512;
        assert_eq!((table.kind(), table.damage()), (TableKind::Gpt, None));
        assert_eq!(
            blocks(&table),
            [(1, 50 * factor, 10 * factor), (128, 60 * factor, factor)]
        );
    }
}

#[tokio::test]
async fn a_damaged_primary_gives_way_to_the_backup() {
    // Where a byte is spoilt, and what is said of it.
    let table = [
        (BLOCK, "the primary header: it has no signature"),
        (BLOCK + 40, "the primary header: its checksum is wrong"),
        (
            2 * BLOCK + 32,
            "the primary table: the checksum of its entries is wrong",
        ),
    ];
    for (at, why) in table {
        let mut image = Image::gpt(BLOCK, &[(3, 50, 59)]);
        image.0[at] ^= 0xff;
        let table = image.table().await.unwrap();
        assert_eq!(blocks(&table), [(3, 50, 10)]);
        assert_eq!(
            table.damage(),
            Some(&*format!("the backup was used, because of {why}"))
        );
        image.0[(BLOCKS as usize - 1) * BLOCK] ^= 0xff;
        assert_eq!(
            image.error().await,
            format!("the GPT is damaged, and so is its backup; {why}")
        );
    }
}

#[tokio::test]
async fn the_backup_of_an_image_that_grew_is_found_by_the_header() {
    let mut image = Image::gpt(BLOCK, &[(1, 50, 59)]);
    image.0.extend([0; 100 * BLOCK]);
    image.0[2 * BLOCK + 200] ^= 1;
    assert_eq!(blocks(&image.table().await.unwrap()), [(1, 50, 10)]);
}

#[tokio::test]
async fn a_header_that_promises_too_much_is_not_followed() {
    for (at, value, why) in [
        (
            80,
            u32::MAX,
            "it says that it has 4294967295 entries of 128 bytes",
        ),
        (
            84,
            u32::MAX,
            "it says that it has 128 entries of 4294967295 bytes",
        ),
        (84, 0, "it says that it has 128 entries of 0 bytes"),
        (76, u32::MAX, "its entries would lie outside the disk"),
    ] {
        let mut image = Image::gpt(BLOCK, &[(1, 50, 59)]);
        image.0[(BLOCKS as usize - 1) * BLOCK] = 0;
        image.put(BLOCK + at, &value.to_le_bytes());
        image.put(BLOCK + 16, &[0; 4]);
        let sum = crc32(&image.0[BLOCK..BLOCK + 92]);
        image.put(BLOCK + 16, &sum.to_le_bytes());
        let error = image.error().await;
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn a_partition_that_ends_before_it_starts_or_wraps_is_refused() {
    let image = Image::gpt(
        BLOCK,
        &[
            (1, 60, 50),
            (2, 1, u64::MAX),
            (3, u64::MAX, u64::MAX),
            (4, 0, u64::MAX),
        ],
    );
    let table = image.table().await.unwrap();
    for number in 1..=4 {
        let error = table.get(number).unwrap_err().to_string();
        assert!(error.contains("does not lie inside the disk"), "{error}");
    }
}

#[tokio::test]
async fn the_window_shows_the_partition() {
    let mut image = Image::gpt(BLOCK, &[(1, 50, 59)]);
    image.put(50 * BLOCK, b"first");
    let disk = image.disk().await;
    let first = PartitionTable::read(&disk).await.unwrap().get(1).unwrap();
    let window = first.window().layer(disk).unwrap().erase();
    assert_eq!(window.geometry().size, 10 * 512);
    let mut bytes = [0; 5];
    window.read(&mut ReadBuf::new(&mut bytes), 0).await.unwrap();
    assert_eq!(&bytes, b"first");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn noise_in_a_table_is_answered(
        kind in 0..2,
        noise in proptest::collection::vec((0usize..6000, any::<u8>()), 0..40),
        resum in any::<bool>(),
    ) {
        let mut image = match kind {
            0 => Image::gpt(BLOCK, &[(1, 50, 59)]),
            _ => {
                let mut image = Image::new();
                image.entry(0, 0, 0x05, 2, 500);
                image.entry(2, 0, 0x83, 1, 10);
                image.entry(2, 1, 0x05, 4, 60);
                image
            }
        };
        for (at, byte) in noise {
            if !(510..512).contains(&at) && at != 450 {
                image.0[at] = byte;
            }
        }
        if kind == 0 && resum {
            let size = u32_at(&image.0, BLOCK + 12).unwrap_or(0).clamp(92, 512) as usize;
            image.put(BLOCK + 16, &[0; 4]);
            let sum = crc32(&image.0[BLOCK..BLOCK + size]);
            image.put(BLOCK + 16, &sum.to_le_bytes());
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        if let Ok(table) = runtime.block_on(image.table()) {
            for partition in table.iter() {
                prop_assert!(partition.size > 0);
                prop_assert!(partition.start + partition.size <= image.0.len() as u64);
            }
        }
    }
}
