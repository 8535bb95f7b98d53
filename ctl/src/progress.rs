//! A progress bar on stderr, when that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::cell::OnceCell;

/// A bar that appears with the first progress.
pub(crate) struct Bar {
    what: &'static str,
    template: &'static str,
    drawn: OnceCell<ProgressBar>,
}

impl Bar {
    /// A bar for `what` is being done.
    pub(crate) fn new(what: &'static str) -> Self {
        Self::with(what, "{msg} {wide_bar} {percent}% {eta}")
    }

    /// The same, where what is done is counted in bytes.
    pub(crate) fn of_bytes(what: &'static str) -> Self {
        let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}";
        Self::with(what, template)
    }

    fn with(what: &'static str, template: &'static str) -> Self {
        Self {
            what,
            template,
            drawn: OnceCell::new(),
        }
    }

    /// Shows how far it got.
    pub(crate) fn show(&self, done: u64, total: u64) {
        let bar = self.drawn.get_or_init(|| {
            let bar = ProgressBar::new(total);
            match ProgressStyle::with_template(self.template) {
                Ok(style) => bar.set_style(style),
                Err(e) => tracing::debug!("plain bar: {e}"),
            }
            bar.set_message(self.what);
            bar
        });
        bar.set_length(total);
        bar.set_position(done.min(total));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.drawn.get() {
            bar.finish_and_clear();
        }
    }
}
