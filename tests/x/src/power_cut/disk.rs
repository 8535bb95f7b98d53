//! A disk with a volatile write cache that a power cut takes in part: an NBD server on a Unix socket.
//!
//! What is written is in the cache until a flush, or FUA, makes it durable. At the cut each sector that was written since
//! holds, by seed, what was durable or any of the values written to it after that: writes are lost, reordered and torn
//! at 512 bytes. What is discarded reads as something that nobody wrote. The protocol is that of
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, fixed newstyle with NBD_OPT_EXPORT_NAME or
//! NBD_OPT_GO, simple replies.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// The moment of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// At once.
    Now,
    /// When the next flush comes, before anything of it is done: the cache is as full as it gets.
    BeforeFlush,
    /// When the next flush was done and answered.
    AfterFlush,
}

#[derive(Debug)]
struct State {
    durable: Vec<u8>,
    /// Values of a sector since the last flush, oldest first.
    cached: BTreeMap<usize, Vec<Sector>>,
    armed: Option<Moment>,
    is_off: bool,
}

/// The disk. Its content lives as long as it does, over all cuts.
#[derive(Debug)]
pub(super) struct Disk {
    state: Mutex<State>,
    changed: Condvar,
    socket: PathBuf,
}

/// What a cut met.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss {
    /// Sectors written and not flushed.
    pub(super) unflushed: usize,
    /// Of those, the ones that do not hold what was written last.
    pub(super) lost: usize,
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.socket));
    }
}

impl Disk {
    /// A disk of so many bytes of zeros, served on a socket at this path.
    pub(super) fn serve(bytes: usize, socket: &Path) -> io::Result<Arc<Self>> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        let disk = Arc::new(Self {
            state: Mutex::new(State {
                durable: vec![0; bytes],
                cached: BTreeMap::new(),
                armed: None,
                is_off: false,
            }),
            changed: Condvar::new(),
            socket: socket.to_owned(),
        });
        let served = Arc::downgrade(&disk);
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Some(disk)) = (client, served.upgrade()) else {
                    return;
                };
                thread::spawn(move || {
                    // The client is killed in the middle of things: however it ends, it is gone.
                    drop(Client { disk, client }.converse());
                });
            }
        });
        Ok(disk)
    }

    /// What qemu opens.
    pub(super) fn address(&self) -> String {
        format!("nbd:unix:{}", self.socket.display())
    }

    /// Cuts the power at that moment, or at once if it does not come within a second. From then on nothing is answered.
    pub(super) fn cut(&self, moment: Moment) {
        let mut state = self.lock();
        state.armed = Some(moment);
        if moment != Moment::Now {
            let waited = self
                .changed
                .wait_timeout_while(state, Duration::from_secs(1), |state| !state.is_off);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_off = true;
    }

    /// The power comes back: what was cached is decided sector by sector.
    pub(super) fn restart(&self, rng: &mut fastrand::Rng) -> Loss {
        let mut guard = self.lock();
        let state = &mut *guard;
        let cached = std::mem::take(&mut state.cached);
        // How much survives is drawn first, so that there are cuts that lose nearly nothing and nearly all.
        let survives = [0.0, 0.05, 0.5, 0.95][rng.usize(..4)];
        let mut loss = Loss {
            unflushed: cached.len(),
            lost: 0,
        };
        for (sector, values) in cached {
            let last = values.len() - 1;
            let kept = (rng.f64() < survives).then(|| {
                // Mostly the newest; an older one was written back before.
                if rng.u8(..4) == 0 {
                    rng.usize(..values.len())
                } else {
                    last
                }
            });
            if let Some(value) = kept.and_then(|kept| values.get(kept)) {
                put(&mut state.durable, sector, value);
            }
            loss.lost += usize::from(kept != Some(last));
        }
        state.armed = None;
        state.is_off = false;
        loss
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put(bytes: &mut [u8], sector: usize, value: &Sector) {
    if let Some(place) = bytes.get_mut(sector * SECTOR..(sector + 1) * SECTOR) {
        place.copy_from_slice(value);
    }
}

impl State {
    fn read(&self, at: usize, bytes: usize) -> Option<Vec<u8>> {
        let mut out = self.durable.get(at..at.checked_add(bytes)?)?.to_vec();
        for (sector, values) in self
            .cached
            .range(at / SECTOR..(at + bytes).div_ceil(SECTOR))
        {
            if let Some(value) = values.last() {
                put(&mut out, sector - at / SECTOR, value);
            }
        }
        Some(out)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let (sectors, _) = bytes.as_chunks::<SECTOR>();
        for (sector, value) in (at / SECTOR..).zip(sectors) {
            self.cached.entry(sector).or_default().push(*value);
        }
    }

    fn flush(&mut self, range: std::ops::Range<usize>) {
        let sectors: Vec<usize> = self
            .cached
            .range(range)
            .map(|(sector, _)| *sector)
            .collect();
        for sector in sectors {
            if let Some(value) = self
                .cached
                .remove(&sector)
                .as_ref()
                .and_then(|all| all.last())
            {
                put(&mut self.durable, sector, value);
            }
        }
    }
}

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u16 = 1;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA and SEND_TRIM.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5;
const CMD_FLAG_FUA: u16 = 1;
const EINVAL: u32 = 22;

struct Client {
    disk: Arc<Disk>,
    client: UnixStream,
}

impl Client {
    fn converse(mut self) -> io::Result<()> {
        if !self.shake_hands()? {
            return Ok(());
        }
        loop {
            self.answer()?;
        }
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.client.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn take_many(&mut self, count: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(count).map_err(io::Error::other)?];
        self.client.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        let bytes = self.disk.lock().durable.len() as u64;
        let mut greeting = Vec::new();
        greeting.extend(network64(NBD_MAGIC));
        greeting.extend(network64(OPTION_MAGIC));
        greeting.extend(network16(FIXED_NEWSTYLE));
        self.client.write_all(&greeting)?;
        let _flags: [u8; 4] = self.take()?;
        loop {
            let _magic: [u8; 8] = self.take()?;
            let option = from_network32(self.take()?);
            let length = from_network32(self.take()?);
            self.take_many(length)?;
            let mut out = Vec::new();
            match option {
                OPT_EXPORT_NAME => {
                    out.extend(network64(bytes));
                    out.extend(network16(EXPORT_FLAGS));
                    out.extend([0; 124]);
                    self.client.write_all(&out)?;
                    return Ok(true);
                }
                OPT_GO => {
                    // NBD_INFO_EXPORT is 0.
                    let mut info = vec![0, 0];
                    info.extend(network64(bytes));
                    info.extend(network16(EXPORT_FLAGS));
                    option_reply(&mut out, option, REP_INFO, &info);
                    option_reply(&mut out, option, REP_ACK, &[]);
                    self.client.write_all(&out)?;
                    return Ok(true);
                }
                OPT_ABORT => return Ok(false),
                _ => {
                    option_reply(&mut out, option, REP_ERR_UNSUP, &[]);
                    self.client.write_all(&out)?;
                }
            }
        }
    }

    fn answer(&mut self) -> io::Result<()> {
        if from_network32(self.take()?) != REQUEST_MAGIC {
            return Err(ErrorKind::InvalidData.into());
        }
        let [flag_high, flag_low, kind_high, kind_low] = self.take()?;
        let flags = u16::from(flag_high) << 8 | u16::from(flag_low);
        let cookie: [u8; 8] = self.take()?;
        let place: [u8; 8] = self.take()?;
        let place = place
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let length = from_network32(self.take()?);
        let kind = u16::from(kind_high) << 8 | u16::from(kind_low);
        let payload = if kind == 1 {
            self.take_many(length)?
        } else {
            Vec::new()
        };
        let at = usize::try_from(place).map_err(io::Error::other)?;
        let bytes = usize::try_from(length).map_err(io::Error::other)?;

        let disk = Arc::clone(&self.disk);
        let mut state = disk.lock();
        let is_flush = kind == 3 || flags & CMD_FLAG_FUA != 0;
        if is_flush && state.armed == Some(Moment::BeforeFlush) {
            state.is_off = true;
            disk.changed.notify_all();
        }
        if state.is_off {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        let is_inside = at
            .checked_add(bytes)
            .is_some_and(|end| end <= state.durable.len());
        let is_aligned = at.is_multiple_of(SECTOR) && bytes.is_multiple_of(SECTOR);
        let mut error = 0;
        let mut read = None;
        match kind {
            _ if kind != 2 && kind != 3 && !(is_inside && is_aligned) => error = EINVAL,
            0 => read = state.read(at, bytes),
            1 => state.write(at, &payload),
            2 => return Err(ErrorKind::ConnectionAborted.into()),
            3 => state.flush(0..usize::MAX),
            4 => state.write(at, &vec![0xde; bytes]),
            _ => error = EINVAL,
        }
        if flags & CMD_FLAG_FUA != 0 {
            state.flush(at / SECTOR..(at + bytes) / SECTOR);
        }
        let mut out = Vec::new();
        out.extend(network32(REPLY_MAGIC));
        out.extend(network32(error));
        out.extend(cookie);
        out.extend(read.unwrap_or_default());
        // Under the lock: after a cut nobody gets an answer.
        self.client.write_all(&out)?;
        if is_flush && state.armed == Some(Moment::AfterFlush) {
            state.is_off = true;
            disk.changed.notify_all();
        }
        Ok(())
    }
}

fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(network64(OPTION_REPLY_MAGIC));
    out.extend(network32(option));
    out.extend(network32(kind));
    out.extend(network32(u32::try_from(data.len()).unwrap_or(0)));
    out.extend(data);
}

// NBD is in network order, which nothing else here is.

fn network64(value: u64) -> impl Iterator<Item = u8> {
    value.to_le_bytes().into_iter().rev()
}

fn network32(value: u32) -> impl Iterator<Item = u8> {
    value.to_le_bytes().into_iter().rev()
}

fn network16(value: u16) -> impl Iterator<Item = u8> {
    value.to_le_bytes().into_iter().rev()
}

fn from_network32(bytes: [u8; 4]) -> u32 {
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}
