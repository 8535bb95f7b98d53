//! The driver's own entries in a queue's ring: fetch a tag's next request, and answer the one before with it.
//!
//! Built here because libublk has them for its own buffers, or as futures, which cost more than a whole lookup.

use io_uring::{opcode, squeue, types};
use libublk::sys;

/// The device's control file in each queue's table of registered files, where libublk puts it.
const CONTROL_FILE: types::Fixed = types::Fixed(0);

/// Where the bytes of a tag's requests are to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Room {
    /// In this process, from here on.
    Buffer(*mut u8),
    /// In the client's own pages, registered with the ring under the tag's number.
    Registered,
}

/// Fetches the first request of a tag.
pub(super) fn fetch(queue: u16, tag: u16, room: Room) -> squeue::Entry {
    command(sys::UBLK_U_IO_FETCH_REQ, queue, tag, room, 0)
}

/// Answers a tag's request, with bytes moved or a negative errno, and fetches the next.
pub(super) fn commit_and_fetch(queue: u16, tag: u16, room: Room, result: i32) -> squeue::Entry {
    command(
        sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ,
        queue,
        tag,
        room,
        result,
    )
}

/// `struct ublksrv_io_cmd` of `linux/ublk_cmd.h`: queue, tag, result, address.
#[expect(
    clippy::host_endian_bytes,
    reason = "the kernel reads its own structs in the machine's order"
)]
#[expect(
    clippy::transmute_ptr_to_ptr,
    reason = "libublk's macro, which knows the entry's layout"
)]
fn command(operation: u32, queue: u16, tag: u16, room: Room, result: i32) -> squeue::Entry {
    let address = match room {
        Room::Buffer(start) => start.addr() as u64,
        Room::Registered => 0,
    };
    let mut fields = [0; 16];
    fields[..2].copy_from_slice(&queue.to_ne_bytes());
    fields[2..4].copy_from_slice(&tag.to_ne_bytes());
    fields[4..8].copy_from_slice(&result.to_ne_bytes());
    fields[8..].copy_from_slice(&address.to_ne_bytes());
    let mut entry = opcode::UringCmd16::new(CONTROL_FILE, operation)
        .cmd(fields)
        .build();
    if matches!(room, Room::Registered) {
        let place = sys::ublk_auto_buf_reg {
            index: tag,
            ..sys::ublk_auto_buf_reg::default()
        };
        let place = sys::ublk_auto_buf_reg_to_sqe_addr(&place);
        libublk::override_sqe!(&mut entry, addr, place);
    }
    entry
}
