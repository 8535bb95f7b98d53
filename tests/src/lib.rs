//! The shared kit of the suites.

pub mod fixture;
pub mod guest;
pub mod image;
pub mod model;
pub mod nbd;
pub mod nbd_kill;
pub mod parallel;
pub mod scheduler;
pub mod sim_device;
pub mod tape;
