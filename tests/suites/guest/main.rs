//! Real ublk devices under real file systems and loads. `cargo x test` runs these in the guest:
//! they need root, a kernel with ublk, and a RAM disk that they may overwrite.

mod churn;
mod copies;
mod devices;
mod doctor;
mod faults;
mod filesystems;
mod freeze;
mod full_pool;
mod gone_devices;
mod hung_device;
mod in_use;
mod inherited;
mod kills;
mod links;
mod log_writes;
mod misplaced;
mod on_full;
mod partitions;
mod ranges;
mod read_only_medium;
mod recovery;
mod rollback;
mod snapshot_sync;
mod snapshots;
mod udev;
