//! The shared kit of the suites.

pub mod crash;
pub mod damage;
pub mod faults;
pub mod fixture;
pub mod fuzz;
pub mod guest;
pub mod held_back;
pub mod image;
pub mod log_writes;
pub mod model;
pub mod nbd_kill;
pub mod oracle;
pub mod parallel;
pub mod queues;
pub mod scheduler;
pub mod script;
pub mod short_way;
pub mod shrink;
pub mod sim_device;
pub mod tape;
pub mod udev;
pub mod witness;

pub use nbd_client as nbd;
