//! How long work shows that it goes on: on standard error, and only if that is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// `total` is how much there is to do, where that is known.
pub(super) fn bar(message: &'static str, total: Option<u64>, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let progress = ProgressBar::with_draw_target(total, target);
    let template = match total {
        Some(_) => "{msg} {wide_bar} {percent}% ({per_sec}, {eta} left)",
        None => "{spinner} {msg}: {human_pos} ({per_sec}, {elapsed})",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        progress.set_style(style);
    }
    progress.set_message(message);
    progress
}
