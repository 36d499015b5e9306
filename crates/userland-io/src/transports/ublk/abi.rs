//! What the kernel's ublk driver speaks: commands, flags and structures of `linux/ublk_cmd.h`, encoded and
//! decoded by hand, so that no struct has to be laid out as C does.

use rustix::ioctl::opcode::{read, read_write};

/// A command to the control device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Control {
    GetQueueAffinity,
    AddDev,
    DelDev,
    StartDev,
    StopDev,
    SetParams,
    GetParams,
    StartUserRecovery,
    EndUserRecovery,
    GetDevInfo,
    GetFeatures,
    DelDevAsync,
    UpdateSize,
    TryStopDev,
}

impl Control {
    /// Its opcode, encoded as an ioctl's.
    pub(super) const fn opcode(self) -> u32 {
        const fn get(number: u8) -> u32 {
            read::<[u8; ControlCommand::LEN]>(b'u', number)
        }
        const fn set(number: u8) -> u32 {
            read_write::<[u8; ControlCommand::LEN]>(b'u', number)
        }
        match self {
            Control::GetQueueAffinity => get(0x01),
            Control::AddDev => set(0x04),
            Control::DelDev => set(0x05),
            Control::StartDev => set(0x06),
            Control::StopDev => set(0x07),
            Control::SetParams => set(0x08),
            Control::GetParams => get(0x09),
            Control::StartUserRecovery => set(0x10),
            Control::EndUserRecovery => set(0x11),
            Control::GetDevInfo => get(0x02),
            Control::GetFeatures => get(0x13),
            Control::DelDevAsync => get(0x14),
            Control::UpdateSize => set(0x15),
            Control::TryStopDev => set(0x17),
        }
    }

    /// Its name, for errors.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Control::GetQueueAffinity => "GET_QUEUE_AFFINITY",
            Control::AddDev => "ADD_DEV",
            Control::DelDev => "DEL_DEV",
            Control::StartDev => "START_DEV",
            Control::StopDev => "STOP_DEV",
            Control::SetParams => "SET_PARAMS",
            Control::GetParams => "GET_PARAMS",
            Control::StartUserRecovery => "START_USER_RECOVERY",
            Control::EndUserRecovery => "END_USER_RECOVERY",
            Control::GetDevInfo => "GET_DEV_INFO",
            Control::GetFeatures => "GET_FEATURES",
            Control::DelDevAsync => "DEL_DEV_ASYNC",
            Control::UpdateSize => "UPDATE_SIZE",
            Control::TryStopDev => "TRY_STOP_DEV",
        }
    }
}

/// `struct ublksrv_ctrl_cmd`: what goes with a command to the control device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ControlCommand {
    pub(super) device: u32,
    pub(super) len: u16,
    pub(super) addr: u64,
    pub(super) data: u64,
}

impl ControlCommand {
    pub(super) const LEN: usize = 32;

    /// The command as the 80 bytes of a long entry.
    pub(super) fn encode(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        put(&mut bytes, 0, self.device.to_ne_bytes());
        // No command of ours is for a queue; the one that names one does so in `data`.
        put(&mut bytes, 4, u16::MAX.to_ne_bytes());
        put(&mut bytes, 6, self.len.to_ne_bytes());
        put(&mut bytes, 8, self.addr.to_ne_bytes());
        put(&mut bytes, 16, self.data.to_ne_bytes());
        bytes
    }
}

bitflags::bitflags! {
    /// What a driver can do, or a device was asked to (`UBLK_F_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Flags: u64 {
        const USER_RECOVERY = 1 << 3;
        const USER_RECOVERY_REISSUE = 1 << 4;
        const CMD_IOCTL_ENCODE = 1 << 6;
        const UPDATE_SIZE = 1 << 10;
        const SAFE_STOP_DEV = 1 << 17;
        const _ = !0;
    }
}

/// `struct ublksrv_ctrl_dev_info`: what a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: u16,
    pub(super) max_transfer: u32,
    pub(super) index: u32,
    pub(super) pid: i32,
    pub(super) flags: Flags,
    /// `ublksrv_flags`: the driver keeps it, and does not look at it.
    pub(super) tag: u64,
}

impl DeviceInfo {
    pub(super) const LEN: usize = 64;
    /// `UBLK_S_DEV_*`.
    pub(super) const DEAD: u16 = 0;
    pub(super) const LIVE: u16 = 1;
    pub(super) const QUIESCED: u16 = 2;

    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        put(&mut bytes, 0, self.queues.to_ne_bytes());
        put(&mut bytes, 2, self.depth.to_ne_bytes());
        put(&mut bytes, 4, self.state.to_ne_bytes());
        put(&mut bytes, 8, self.max_transfer.to_ne_bytes());
        put(&mut bytes, 12, self.index.to_ne_bytes());
        put(&mut bytes, 16, self.pid.to_ne_bytes());
        put(&mut bytes, 24, self.flags.bits().to_ne_bytes());
        put(&mut bytes, 32, self.tag.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::LEN]) -> Self {
        DeviceInfo {
            queues: u16::from_ne_bytes(get(bytes, 0)),
            depth: u16::from_ne_bytes(get(bytes, 2)),
            state: u16::from_ne_bytes(get(bytes, 4)),
            max_transfer: u32::from_ne_bytes(get(bytes, 8)),
            index: u32::from_ne_bytes(get(bytes, 12)),
            pid: i32::from_ne_bytes(get(bytes, 16)),
            flags: Flags::from_bits_retain(u64::from_ne_bytes(get(bytes, 24))),
            tag: u64::from_ne_bytes(get(bytes, 32)),
        }
    }
}

bitflags::bitflags! {
    /// `UBLK_ATTR_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Attributes: u32 {
        const READ_ONLY = 1 << 0;
        const ROTATIONAL = 1 << 1;
        const VOLATILE_CACHE = 1 << 2;
        const FUA = 1 << 3;
        const _ = !0;
    }
}

/// `struct ublk_params`, as far as we set it: `basic` and `discard`. Lengths ending in `shift` are powers of two, and
/// those in `sectors` count 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Params {
    pub(super) attributes: Attributes,
    pub(super) logical_block_shift: u8,
    pub(super) physical_block_shift: u8,
    pub(super) io_opt_shift: u8,
    pub(super) io_min_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) sectors: u64,
    pub(super) discard_granularity: u32,
    pub(super) max_discard_sectors: u32,
    pub(super) max_write_zeroes_sectors: u32,
}

impl Params {
    pub(super) const LEN: usize = 60;
    /// `UBLK_PARAM_TYPE_BASIC` and `UBLK_PARAM_TYPE_DISCARD`.
    const TYPES: u32 = 1 | 2;

    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = Self::request();
        put(&mut bytes, 4, Self::TYPES.to_ne_bytes());
        put(&mut bytes, 8, self.attributes.bits().to_ne_bytes());
        bytes[12] = self.logical_block_shift;
        bytes[13] = self.physical_block_shift;
        bytes[14] = self.io_opt_shift;
        bytes[15] = self.io_min_shift;
        put(&mut bytes, 16, self.max_sectors.to_ne_bytes());
        put(&mut bytes, 24, self.sectors.to_ne_bytes());
        put(&mut bytes, 44, self.discard_granularity.to_ne_bytes());
        put(&mut bytes, 48, self.max_discard_sectors.to_ne_bytes());
        put(&mut bytes, 52, self.max_write_zeroes_sectors.to_ne_bytes());
        // Segments of a discard: the driver takes one, or none.
        let segments = u16::from(self.max_discard_sectors > 0);
        put(&mut bytes, 56, segments.to_ne_bytes());
        bytes
    }

    /// What a question for the parameters begins with: how much of them is wanted.
    pub(super) fn request() -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        put(&mut bytes, 0, (Self::LEN as u32).to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at| u32::from_ne_bytes(get(bytes, at));
        Params {
            attributes: Attributes::from_bits_retain(word(8)),
            logical_block_shift: bytes[12],
            physical_block_shift: bytes[13],
            io_opt_shift: bytes[14],
            io_min_shift: bytes[15],
            max_sectors: word(16),
            sectors: u64::from_ne_bytes(get(bytes, 24)),
            discard_granularity: word(44),
            max_discard_sectors: word(48),
            max_write_zeroes_sectors: word(52),
        }
    }
}

/// The command that asks for a tag's first request (`UBLK_U_IO_FETCH_REQ`).
pub(super) const FETCH: u32 = read_write::<[u8; IO_COMMAND_LEN]>(b'u', 0x20);
/// The command that answers a tag's request and asks for the next (`UBLK_U_IO_COMMIT_AND_FETCH_REQ`).
pub(super) const COMMIT_AND_FETCH: u32 = read_write::<[u8; IO_COMMAND_LEN]>(b'u', 0x21);
const IO_COMMAND_LEN: usize = 16;
/// A command's result when there is a request (`UBLK_IO_RES_OK`). All others end the tag.
pub(super) const RES_OK: i32 = 0;
/// A command's result when the device has stopped (`UBLK_IO_RES_ABORT`).
pub(super) const RES_ABORT: i32 = -libc::ENODEV;

/// `struct ublksrv_io_cmd`: what goes with a command for a tag. `result` is the answer to the request before, `addr`
/// where the bytes of the next go.
pub(super) fn io_command(queue: u16, tag: u16, result: i32, addr: u64) -> [u8; IO_COMMAND_LEN] {
    let mut bytes = [0; IO_COMMAND_LEN];
    put(&mut bytes, 0, queue.to_ne_bytes());
    put(&mut bytes, 2, tag.to_ne_bytes());
    put(&mut bytes, 4, result.to_ne_bytes());
    put(&mut bytes, 8, addr.to_ne_bytes());
    bytes
}

/// The length of a request's description in the memory shared with the driver (`struct ublksrv_io_desc`).
pub(super) const DESCRIPTION_LEN: usize = 24;
/// Where the descriptions of queue `q` are: at this many bytes times `q`, whatever the depth (`UBLK_MAX_QUEUE_DEPTH`
/// descriptions, and no less than whole pages).
pub(super) fn descriptions_offset(queue: u16, page: usize) -> u64 {
    const MAX_DEPTH: usize = 4096;
    let each = (MAX_DEPTH * DESCRIPTION_LEN).next_multiple_of(page);
    u64::from(queue) * each as u64
}

/// A request, as the driver describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Description {
    /// `op_flags`: the operation in the low byte, flags above.
    op_flags: u32,
    sectors: u32,
    start_sector: u64,
}

/// What a request asks for (`UBLK_IO_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Description {
    pub(super) fn decode(bytes: &[u8; DESCRIPTION_LEN]) -> Self {
        Description {
            op_flags: u32::from_ne_bytes(get(bytes, 0)),
            sectors: u32::from_ne_bytes(get(bytes, 4)),
            start_sector: u64::from_ne_bytes(get(bytes, 8)),
        }
    }

    pub(super) fn operation(&self) -> Option<Operation> {
        Some(match self.op_flags & 0xff {
            0 => Operation::Read,
            1 => Operation::Write,
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes,
            _ => return None,
        })
    }

    /// `UBLK_IO_F_FUA`.
    pub(super) fn fua(&self) -> bool {
        self.op_flags & (1 << 13) != 0
    }

    /// `UBLK_IO_F_NOUNMAP`.
    pub(super) fn no_unmap(&self) -> bool {
        self.op_flags & (1 << 15) != 0
    }

    /// Where it starts, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.start_sector.saturating_mul(512)
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> u64 {
        u64::from(self.sectors) * 512
    }
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|n| bytes[at + n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn opcodes_are_the_headers() {
        assert_eq!(Control::AddDev.opcode(), 0xc020_7504);
        assert_eq!(Control::GetDevInfo.opcode(), 0x8020_7502);
        assert_eq!(Control::GetFeatures.opcode(), 0x8020_7513);
        assert_eq!(Control::DelDevAsync.opcode(), 0x8020_7514);
        assert_eq!(Control::UpdateSize.opcode(), 0xc020_7515);
        assert_eq!((FETCH, COMMIT_AND_FETCH), (0xc010_7520, 0xc010_7521));
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        let info = DeviceInfo {
            queues: 2,
            depth: 128,
            state: DeviceInfo::QUIESCED,
            max_transfer: 512 << 10,
            index: 7,
            pid: -1,
            flags: Flags::USER_RECOVERY | Flags::from_bits_retain(1 << 40),
            tag: u64::MAX - 1,
        };
        assert_eq!(DeviceInfo::decode(&info.encode()), info);
        let params = Params {
            attributes: Attributes::FUA | Attributes::VOLATILE_CACHE,
            logical_block_shift: 9,
            physical_block_shift: 12,
            io_opt_shift: 16,
            io_min_shift: 13,
            max_sectors: 1024,
            sectors: 1 << 40,
            discard_granularity: 65536,
            max_discard_sectors: 8,
            max_write_zeroes_sectors: u32::MAX >> 9,
        };
        assert_eq!(Params::decode(&params.encode()), params);
        assert_eq!(params.encode()[56..58], 1_u16.to_ne_bytes());
    }

    #[test]
    fn queues_are_apart_by_the_deepest() {
        assert_eq!(descriptions_offset(0, 4096), 0);
        assert_eq!(descriptions_offset(3, 4096), 3 * 98304);
        assert_eq!(descriptions_offset(1, 65536), 131_072);
    }
}
