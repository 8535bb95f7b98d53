//! The shared kit of the suites.

pub mod guest;
