//! cargo x: every developer command.
fn main() {}
