//! The shared kit of the suites.
